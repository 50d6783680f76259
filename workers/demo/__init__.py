"""`outbox demo`: the promise kept on real files, while workers are being killed.

model     the application's rows
traffic   an ordinary application: a row, a blob and a document a file, and a saga a folder, in ORM transactions
publish   the saga: a folder is published and mailed, or nothing of it is left
nemesis   kills workers with SIGKILL, and Postgres once
check     looks at the participants themselves: what is there, what isn't, what is there twice
report    the result as a table or as JSON
"""
