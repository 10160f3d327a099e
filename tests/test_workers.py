"The scheduler of a grid: with made-up workers, with real processes that are killed, and on two Ray nodes: a notebook whose kernel is killed, a node that is lost. No torch in here."
import json, os, random, shutil, signal, socket, subprocess, sys, time
from collections import deque
from pathlib import Path
import pytest
from cdfss.basics import InputError
from cdfss.engine.workers import Cell, Local, RayCluster, capacity, schedule

REHEARSAL = 'cdfss.engine.workers:rehearsal'

# ---- the scheduler, with workers that are made up ---------------------------------------------------------------------------
class MadeUp:
    "Workers without processes: each job's value lists how its starts end, e.g. ['died', 'busy', 'done']; some workers never start. Remembers who worked beside whom."
    def __init__(self, chance, slots, unfit=()):
        self.chance, self.count, self.unfit, self.heard, self.closed, self.starts, self.alive, self.given = chance, slots, set(unfit), deque(), 0, [], set(), {}
    def slots(self): return self.count
    def open(self, slot):
        assert slot not in self.alive
        self.alive.add(slot)
        self.heard.append((slot, dict(kind='unfit' if slot in self.unfit else 'ready', said='it sees no folder', where=f'w{slot}')))
        if slot in self.unfit: self.alive.discard(slot)
    def give(self, slot, value):
        assert slot in self.alive and slot not in self.given and value['n'] not in self.given.values(), 'two jobs for a worker, or two workers for a job'
        self.given[slot] = value['n']
        self.starts.append(value['n'])
        end = value['ends'].pop(0)
        self.heard.append((slot, dict(kind='said', said='begun')))
        self.heard.append((slot, dict(kind=end, said=f'{end} it said', value=value['n'])))
    def next(self, timeout):
        if not self.heard: return time.sleep(min(timeout, .01))
        slot = self.chance.choice([s for s, _ in self.heard])                                # in any order between workers, in order of each
        at = next(i for i, (s, _) in enumerate(self.heard) if s == slot)
        news = self.heard[at]
        del self.heard[at]
        if news[1]['kind'] == 'died': self.alive.discard(slot)
        if news[1]['kind'] != 'said': self.given.pop(slot, None)
        return news
    def end(self, slot): self.heard.append((slot, dict(kind='died', said='ended')))
    def close(self): self.closed += 1

@pytest.mark.parametrize('seed', range(30))
def test_every_cell_ends_once_whatever_happens(seed):
    chance = random.Random(seed)
    n, retries, slots = chance.randint(1, 12), chance.randint(0, 3), chance.randint(1, 5)
    ends = [chance.choices(['died', 'memory', 'busy', 'done', 'refused', 'failed'], [3, 1, 1, 6, 1, 1], k=20) + ['done'] for _ in range(n)]
    grid, engine, seen = [Cell(dict(n=k, ends=list(e))) for k, e in enumerate(ends)], MadeUp(chance, slots, chance.sample(range(slots), chance.randint(0, slots - 1))), []
    schedule(grid, engine, retries, lambda c: seen.append((c.value['n'], c.status)), again=0.)
    assert engine.closed == 1
    for k, (c, planned_ends) in enumerate(zip(grid, ends)):
        lost = 0
        for i, e in enumerate(planned_ends):
            if e in ('died', 'memory'):
                lost += 1
                if lost > retries: break
            elif e != 'busy': break
        assert c.status == ('done' if e == 'done' else 'failed'), (k, planned_ends)
        assert engine.starts.count(k) == i + 1 and c.attempts == lost + (e in ('done', 'refused', 'failed'))
        assert [s for m, s in seen if m == k and s in ('done', 'failed')] == [c.status] and seen[-1][1] in ('done', 'failed')
        assert c.said == '' if e == 'done' else f'{e} it said' in c.said

def test_what_is_busy_too_long_is_given_up():
    grid = [Cell(dict(n=0, ends=['busy']*10_000)), Cell(dict(n=1, ends=['done']))]
    schedule(grid, MadeUp(random.Random(0), 1), patience=.2, again=.02)
    assert [c.status for c in grid] == ['failed', 'done'] and grid[0].said == 'busy it said' and grid[0].attempts == 1

def test_without_a_worker_the_reason_is_told():
    grid = [Cell(dict(n=k, ends=['done'])) for k in range(3)]
    schedule(grid, MadeUp(random.Random(0), 2, unfit=(0, 1)))
    assert {(c.status, c.said) for c in grid} == {('failed', 'no worker could be started: it sees no folder')}

@pytest.mark.parametrize('seed', range(20))
def test_what_comes_after_begins_when_the_others_are_done_and_sees_what_they_returned(seed):
    chance = random.Random(seed)
    n, retries, slots = chance.randint(2, 14), chance.randint(0, 2), chance.randint(1, 4)
    grid = [Cell(dict(n=k, ends=chance.choices(['died', 'busy', 'done', 'failed'], [2, 1, 8, 1], k=20) + ['done']), name=f'job {k}') for k in range(n)]
    for k, c in enumerate(grid):
        c.after = chance.sample(grid[:k], min(k, chance.choice((0, 1, 1, 2))))
        c.take = lambda *results: dict(seen=list(results))
    grid[0].status, grid[0].result = chance.choice([('waiting', None), ('done', 0), ('failed', None)])         # as another time left it
    given, engine, order = {}, MadeUp(chance, slots), []
    def give(slot, value):
        given[value['n']] = value
        assert all(c.status == 'done' for c in grid[value['n']].after)
        MadeUp.give(engine, slot, value)
    engine.give = give
    asked = chance.sample(grid, n)
    schedule(asked, engine, retries, lambda c: order.append((c.value['n'], c.status)), again=0.)
    for c in grid:
        lost = [a for a in c.after if a.status == 'failed']
        if lost: assert c.status == 'failed' and not c.attempts and c.said in [f"'{a.name}' failed" for a in lost] and c.value['n'] not in given
        else: assert c.status in ('done', 'failed') and (c is grid[0] or given[c.value['n']]['seen'] == [a.value['n'] for a in c.after])
        assert 'seen' not in c.value and len([1 for m, s in order if m == c.value['n'] and s in ('done', 'failed')]) == (c.value['n'] in given or bool(lost))
    assert engine.closed == 1

def test_what_can_never_begin_is_refused_at_once():
    a, b, c = (Cell(dict(n=n, ends=['done']), name=n) for n in 'abc')
    a.after, b.after, c.after = [b], [c], [a]
    with pytest.raises(InputError, match='jobs that wait for each other: a, b, c'): schedule([a, b, c], engine := MadeUp(random.Random(0), 2))
    with pytest.raises(InputError, match="b: comes after 'c', which is not among the jobs"): schedule([b], engine)
    assert engine.closed == 2 and not engine.alive and {x.status for x in (a, b, c)} == {'waiting'}
    nameless = Cell(dict(n=0, ends=['failed'])), Cell(dict(n=1, ends=['done']))
    nameless[1].after = nameless[:1]
    schedule(nameless, MadeUp(random.Random(0), 2))
    assert nameless[1].said == 'what it comes after failed: failed it said'

class Shrinking(MadeUp):
    "A cluster that loses the node of its first worker: what is started in its place waits for a node for ever."
    def slots(self): return self.count if 0 in self.alive or not self.starts else self.count - 1
    def open(self, slot):
        super().open(slot)
        if self.starts: self.heard.pop()

def test_a_cluster_that_shrinks_goes_on_with_what_is_left():
    grid = [Cell(dict(n=0, ends=['died', 'done']))] + [Cell(dict(n=n, ends=['done'])) for n in range(1, 6)]
    schedule(grid, engine := Shrinking(random.Random(0), 2))
    assert {c.status for c in grid} == {'done'} and sorted(engine.starts) == [0, 0, 1, 2, 3, 4, 5]

# ---- processes of this machine ----------------------------------------------------------------------------------------------
def alive(pid:int) -> bool:
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError: return False

def gone(pids, within:float=10.) -> bool:
    end = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < end: time.sleep(.05)
    return not any(map(alive, pids))

def test_processes_die_and_are_replaced(tmp_path):
    deaths = dict(killed='SIGKILL', ended='SIGTERM', segfault='SIGSEGV', memory='memory', refused='refused')
    grid = [Cell(dict(n=n, mark=str(tmp_path/n), death=d)) for n, d in deaths.items()] + [Cell(dict(n='always', mark=str(tmp_path/'always'), death='SIGKILL', always=True)), Cell(dict(n='fine'))]
    schedule(grid, Local(REHEARSAL, [{}, {}]), retries=1)
    at = {c.value['n']: c for c in grid}
    assert {n for n, c in at.items() if c.status == 'done'} == {'killed', 'ended', 'segfault', 'memory', 'fine'}
    assert at['always'].said == 'its process was ended by SIGKILL (by hand, or for want of memory); given up after 2 starts'
    assert at['refused'].said == 'death=refused: as asked' and {n: c.attempts for n, c in at.items()} == dict(killed=2, ended=2, segfault=2, memory=2, refused=1, always=2, fine=1)
    assert gone({int(p) for f in tmp_path.iterdir() for p in f.read_text().split()}, 5.)

def test_a_worker_that_cannot_start_is_given_up():
    grid = [Cell(dict(n=0)), Cell(dict(n=1))]
    schedule(grid, Local('cdfss.engine.workers:no_such_job', [{}, {}]))
    assert all(c.status == 'failed' and 'no worker could be started: its process ended with code 1: AttributeError' in c.said and '\n' not in c.said for c in grid)

def test_a_time_limit_stops_what_runs_and_the_rest_goes_on_later(tmp_path):
    quick, slow = Cell(dict(n='quick', mark=str(tmp_path/'quick')), name='quick'), Cell(dict(n='slow', mark=str(tmp_path/'slow'), seconds=600.), name='slow')
    after = Cell(dict(mark=str(tmp_path/'after')), name='after', after=(quick, slow), take=lambda one, two: dict(n=[one['n'], two['n']]))
    grid, began = [after, quick, slow], time.monotonic()
    schedule(grid, Local(REHEARSAL, [{}, {}]), limit=5.)
    assert time.monotonic() - began < 120 and [c.status for c in grid] == ['waiting', 'done', 'waiting'] and slow.said == 'interrupted'
    assert gone({int(p) for f in tmp_path.iterdir() for p in f.read_text().split()}, 5.) and not (tmp_path/'after').exists()
    schedule(grid, Local(REHEARSAL, [{}]), limit=0.)
    assert [c.status for c in grid] == ['waiting', 'done', 'waiting'] and slow.attempts == 1
    slow.value['seconds'] = 0.
    schedule(grid, Local(REHEARSAL, [{}, {}]))
    assert [c.status for c in grid] == ['done']*3 and after.result['n'] == ['quick', 'slow'] and quick.attempts == 1

DRIVER = '''
import json, sys
from cdfss.engine.workers import Cell, Local, schedule
grid = [Cell(v) for v in json.loads(sys.argv[1])]
try: schedule(grid, Local('cdfss.engine.workers:rehearsal', [{}, {}]), change=lambda c: print(c.value['n'], c.status, flush=True))
except KeyboardInterrupt: print('interrupted', flush=True)
'''

@pytest.mark.parametrize('by', ['SIGKILL', 'SIGINT'])
def test_a_driver_that_ends_leaves_no_worker(tmp_path, by):
    jobs = [dict(n=0, mark=str(tmp_path/'0'), seconds=0.), dict(n=1, mark=str(tmp_path/'1'), seconds=600.), dict(n=2, mark=str(tmp_path/'2'), seconds=600.)]
    heeds = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)                    # a shell's background jobs, and what they start, ignore it
    driver = subprocess.Popen([sys.executable, '-c', DRIVER, json.dumps(jobs)], stdout=subprocess.PIPE, text=True, preexec_fn=heeds)
    while not ((tmp_path/'1').exists() and (tmp_path/'2').exists() and (tmp_path/'2').read_text().endswith('\n')): time.sleep(.05)
    pids = {int((tmp_path/n).read_text()) for n in '12'}
    assert len(pids) == 2 and all(map(alive, pids))
    driver.send_signal(getattr(signal, by))
    said = driver.communicate(timeout=60)[0]
    assert ('interrupted' in said) == (by == 'SIGINT') and '0 done' in said and gone(pids)

# ---- Ray --------------------------------------------------------------------------------------------------------------------
def test_without_ray_a_line_says_how_to_have_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(InputError, match=r"Ray is not installed; pip install 'cdfss\[ray\]'"): RayCluster(REHEARSAL)

@pytest.fixture(scope='module')
def nodes(tmp_path_factory):
    "A Ray cluster of two nodes, a CPU each, in this machine, whose processes have `mark` in their environment."
    with pytest.MonkeyPatch.context() as m: yield from _cluster(m, mark=str(tmp_path_factory.mktemp('mark')))

def _cluster(monkeypatch, mark):
    for name, value in dict(RAY_USAGE_STATS_ENABLED=0, RAY_worker_register_timeout_seconds=600, CDFSS_TEST_MARK=mark).items(): monkeypatch.setenv(name, str(value))       # Ray waits for ever for a worker that it gave up
    ray = pytest.importorskip('ray')
    from ray._private import node
    from ray.cluster_utils import Cluster
    real = node.Node.start_raylet
    def start_raylet(self, *given, **more):
        for name in ('metrics_agent', 'metrics_export', 'dashboard_agent_listen'):           # as its agent, which has no port without a dashboard, would write: a node that waits for it dies after 15 s
            Path(self._session_dir, f'{name}_port_{self._node_id}').write_text('-1')
        real(self, *given, **more)
    monkeypatch.setattr(node.Node, 'start_raylet', start_raylet)
    with socket.create_server(('', 0)) as one, socket.create_server(('', 0)) as two: ports = [s.getsockname()[1] for s in (one, two)]
    settings = dict(num_cpus=1, object_store_memory=80_000_000, include_log_monitor=False)
    cluster = Cluster(initialize_head=True, head_node_args=dict(include_dashboard=False, runtime_env_agent_port=ports[0], **settings))
    second = cluster.add_node(runtime_env_agent_port=ports[1], **settings)
    yield cluster, second, mark
    ray.shutdown()
    cluster.shutdown()

def workers(mark:str) -> list[int]:
    "Processes of the cluster that are workers of ours."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try:
            if (p/'cmdline').read_text().startswith('ray::_Actor') and mark.encode() in (p/'environ').read_bytes(): found.append(int(p.name))
        except OSError: continue
    return found

def until(true, seconds:float, said):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, said()
        time.sleep(.1)
    return found

@pytest.mark.slow
def test_a_sweep_on_ray_whose_driver_is_killed_goes_on_where_it_was(nodes, miniature, tmp_path):
    "Through papermill. The notebook's kernel, which is the driver, gets SIGKILL while the second run is in the middle: its worker ends, and the same command finishes that run alone."
    cluster, _, mark = nodes
    runs, book, root = tmp_path/'runs', tmp_path/'out.ipynb', Path(__file__).parent.parent
    given = dict(methods='ssp; prototype epochs=30', engine='ray', address=cluster.address, workers=1, targets='isic', data_root=miniature, runs=runs,
                 settings='backbone=miniature; weights=none; size=32; epochs=0; fit_episodes=16; test_episodes=6; track=none; shots=1; samples=0; device=cpu')
    def start(): return subprocess.Popen([shutil.which('papermill', path=str(Path(sys.executable).parent)), str(root/'nbs'/'sweep.ipynb'), str(book), *(a for k, v in given.items() for a in ('-p', k, str(v)))],
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    def epochs(name): return sum(len(p.read_text().splitlines()) - 1 for p in runs.glob(f'{name}-*/history.csv'))
    def kernel(of): return next(p.name for p in Path('/proc').glob('[0-9]*') if (p/'stat').exists() and (p/'stat').read_text().rsplit(')', 1)[1].split()[1] == str(of.pid) and 'ipykernel' in (p/'cmdline').read_text())
    first = start()
    until(lambda: epochs('prototype') > 2 or first.poll() is not None, 200, lambda: f'{epochs("prototype")} epochs, {book.read_text()[-3000:]}')
    assert first.poll() is None, first.stdout.read()[-2000:]
    ended, mine = [f.parent for f in runs.glob('*/metrics.json')], workers(mark)
    was = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in ended[0].rglob('*') if p.is_file()}
    os.kill(int(kernel(first)), signal.SIGKILL)
    assert 'DeadKernelError' in first.communicate(timeout=100)[0] and first.returncode != 0
    assert len(ended) == 1 and ended[0].name.startswith('ssp') and len(was) > 5 and len(mine) == 1
    until(lambda: not workers(mark), 60, lambda: f'workers {workers(mark)} are left')
    assert len(list(runs.glob('*/metrics.json'))) == 1 and 2 < epochs('prototype') < 31
    again = start()
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0, said[-2000:]
    kept = json.loads(next(runs.glob('sweep-*.json')).read_text())
    assert [(c['status'], c['starts']) for c in kept['cells']] == [('found finished', 1), ('done', 1)] and 'isic 1-shot' in book.read_text()
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in was} == was, 'what was finished is as it was'
    assert epochs('prototype') == 31 and len(list(runs.glob('*/metrics.json'))) == 2 and not workers(mark)

class Doomed(RayCluster):
    "Tells of no worker before both are ready, so that both have jobs from the start; what the node `second` is given takes so long that it is lost in the middle."
    second = ''
    def __init__(self, *given):
        super().__init__(*given)
        self.held, self.places = [], {}
    def next(self, timeout):
        news = super().next(timeout)
        if news is None or len(self.held) == 2: return news
        self.held.append(news)
        self.places[news[0]] = news[1]['where'].split('/')[1]
        if len(self.held) == 2: self.heard.extend(self.held)
    def give(self, slot, value): super().give(slot, value | (dict(seconds=300.) if self.second.startswith(self.places.get(slot, '-')) else {}))

def test_a_lost_node_loses_nothing_that_was_finished(nodes, tmp_path):
    cluster, second, mark = nodes
    grid, lost = [Cell(dict(n=n, mark=str(tmp_path/str(n)), seconds=.2)) for n in range(6)], []
    engine = Doomed(REHEARSAL, cluster.address)
    engine.second = second.node_id
    assert engine.slots() == 2
    def change(c):
        running = [r for r in grid if r.status == 'running' and Path(r.value['mark']).exists()]
        if c.status == 'done' and running and not lost:                                      # the other node has finished something, this one is in the middle
            lost.extend(running)
            cluster.remove_node(second, allow_graceful=False)
            engine.second = '-'
    schedule(grid, engine, retries=2, change=change)
    assert len(lost) == 1 and all(c.status == 'done' for c in grid), [(c.status, c.said) for c in grid]
    assert {c.value['n'] for c in grid if c.attempts == 2} == {lost[0].value['n']} and {c.attempts for c in grid} == {1, 2}
    assert [len(Path(c.value['mark']).read_text().split()) for c in grid] == [c.attempts for c in grid]            # the one that was lost was begun again, no other

def test_workers_that_fit_on_nodes():
    node = lambda alive=True, **r: dict(Alive=alive, Resources=r)
    nodes = [node(CPU=16., GPU=8.), node(CPU=4., GPU=1.), node(CPU=64.), node(False, CPU=64., GPU=8.)]
    assert capacity(nodes, 1) == 84 and capacity(nodes, 2, 1.) == 9 and capacity(nodes, 1, .5) == 16 + 2 and capacity(nodes, 3, 1.) == 5 + 1 and capacity(nodes, 65) == 0
    for per in range(1, 20): assert capacity([node(CPU=999., GPU=3.)], 1, int(1e4/per)/1e4) == 3*per
