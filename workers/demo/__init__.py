"""`outbox demo`: the promise kept on real files, while workers are being killed.

traffic   an ordinary application: a row, a blob and a document a file, a mail a folder, in ORM transactions
nemesis   kills workers with SIGKILL, and Postgres once
check     looks at the participants themselves: what is there, what isn't, what is there twice
report    the result as a table or as JSON
"""
