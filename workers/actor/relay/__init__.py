"""The relay of actors' messages: from the lanes of their queues to dramatiq's own broker, RabbitMQ or Redis.

    lane → reader → participant → link → the broker → workers anywhere
    engine ← outbox.relay_told ← returns ← the broker's return queue ← `outbox.actor.Outcomes` at a worker there

What `outbox work relay` runs. `participant` is a participant like any other, and the reader does with it what it does
with all; `link` is what it needs of a broker, `rabbit` and `redis` are the two; `address` is where the broker is;
`book` is what Postgres knows of relayed queues and messages; `returns` hears what the far side tells.
"""
