"""The processes that drain the log: the clock, the reader, the participants, the embedded stack.

Nothing in `outbox` imports this package; it contributes its commands through the entry-point group
`outbox.commands`.
"""
