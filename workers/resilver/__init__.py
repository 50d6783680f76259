"""Resilver: a participant's data built anew from base and log, beside those that serve, and then put in their place.

`outbox resilver index` (`workers.resilver.index`) builds the next generation of the index, in as many shards as it is
told; `outbox resilver blob` (`workers.resilver.blob`) goes through a blob store. Both are operations
(`outbox.operation`): killed anywhere, they are taken up again.
"""
