from tests.integration.test_reader import *
from outbox.errors import Unavailable
from outbox import sql, lane as lanes
import pytest

def test_thinned(bench):
    reader = bench.reader()
    bench.emit("a"); bench.drain(reader)
    print("pos", reader.position)
    # ticks with nothing for it, passed in memory only
    for _ in range(3):
        bench.admin.execute("select outbox.emit('index','put','x')")
        bench.clock.step(); reader._written_at = 1e18; reader.step(); reader.step()
    print("mem", reader.position, "written", reader._written)
    for n in range(150): bench.emit(f"k{n}")
    bench.clock.step()
    bench.sink.fate["k0"] = Unavailable("down")
    with pytest.raises(Unavailable): reader.step()
    # an hour later
    bench.admin.execute("update outbox.tick set at = at - interval '2 hours'")
    for n in range(3):
        bench.emit(f"l{n}"); bench.clock.step()
    bench.conn.execute(sql.load("tick_thin"), {"age": "1 hour"})
    print(bench.admin.execute("select id, nonce from outbox.tick order by id").fetchall())
    del bench.sink.fate["k0"]
    reader.step()   # one page of two
    print("pos", reader.position)
    # it dies
    bench.die()
    again = bench.reader()
    bench.drain(again)
    print(len(bench.sink.effects), len(set(k for k,_ in bench.sink.effects)))
