def test_migrated(worker):
    assert worker.execute("select count(*) from outbox.lane").fetchone() == (4,)
    assert worker.execute("select outbox.slot('abc')").fetchone()
