"""Sagas: business operations over several participants, each completed or compensated, or shown stuck.

* `outbox.saga.definition`: what an application declares.
* `outbox.saga.plan`: the steps as a pure value, and the linter.
* `outbox.saga.machine`: the one transition function.
* `outbox.saga.run`: what a step's function is given.
* `outbox.saga.store`: the rows of sagas, read and written in batches by the engine (`workers.engine`).
* `outbox.saga.report`: how a participant's worker tells the engine what became of a step's intent.
"""
