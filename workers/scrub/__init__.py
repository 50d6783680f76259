"""Scrub: whether participants hold what base and log say, from end to end.

A participant can be wrong although every intent was applied: a disk flips a bit, somebody restores a folder, deletes a
file, edits an index. Nobody notices until the one document is searched for. Scrub reads all that a participant holds,
as one reads a disk of a RAID from end to end, and compares it with what it should hold:

* `survey`: one participant, as an operation that can be resumed; `comparison` is how differences become findings;
* `index`, `blob`, `own`: what is asked of each participant (`subject`); `mail` is compared with its server's log;
* `repair`: findings become repetitions (`outbox.repetition`), which the lanes apply like anything else;
* `schedule`: the same, when it is time.

Only `repair` writes anything but the operation's progress. Nothing here takes a lane from its worker.
"""
