"""Delivery of actors' messages: from the lanes of their queues to dramatiq's threads, and back.

    lane → page → claim → channel → dramatiq's thread → acknowledgement → position

`delivery` is the thread that does it, one for all queues of a process; `holding` is a lane that it owns; `channel` is
where one queue's messages wait for dramatiq; `ledger` writes down what became of them; `retries` takes what is parked;
`share` divides the lanes among processes; `keeper` keeps the leases; `consumer` is what dramatiq sees.
"""
