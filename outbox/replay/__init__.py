"""Replay: say again what the log has said, so that a participant gets it back.

choice.py   which intents are meant
plan.py     what would become of each of them, counted, and how long it takes
course.py   does it: appends repetitions (`outbox.repetition`), chunk by chunk, and can be taken up again
resent.py   a mail that is sent once more
"""
