"Sweeps: the grammar of the grid, placement, the live table and its record, real runs whose worker is killed, the notebook."
import functools, json, os, shutil, signal, subprocess, sys
from pathlib import Path
import pandas as pd
import pytest
from cdfss.basics import InputError
from cdfss.engine.grid import shares
from cdfss.engine.runs import Run
from cdfss.engine.train import TrainSettings, train
from cdfss.engine.workers import Cell
from cdfss.report import sweeps
from cdfss.report.sweeps import Board, SweepOptions, planned, sweep

# ---- the grammar ------------------------------------------------------------------------------------------------------------
def test_the_grid_is_the_product():
    grid = planned(SweepOptions(methods='ssp; lcm lcm_k=3,5', seeds='0-1,7', targets='isic,chest; fss', settings='lr=0.001,0.0005; shots=[1,5]; freeze=none; compare=False', runs='there'))
    assert len(grid) == 3*3*2*2 and {s['runs'] for s in grid} == {'there'} and {s['shots'] for s in grid} == {'1,5'} and {s['targets'] for s in grid} == {'isic,chest', 'fss'}
    assert {(s['method'], s.get('lcm_k')) for s in grid} == {('ssp', None), ('lcm', 3), ('lcm', 5)} and {s['lr'] for s in grid} == {.001, .0005}
    assert {s['freeze'] for s in grid} == {'none'} and {s['compare'] for s in grid} == {False}
    for s in grid: TrainSettings.make(s)

@pytest.mark.parametrize('given,n', [(dict(methods='lcm; ssp+lcm'), 1), (dict(methods='ssp; lcm', settings='lcm_k=3,5'), 3), (dict(seeds='1,1,0-1'), 2), (dict(settings='shots=[1,5],[5,1],1'), 2),
                                     (dict(settings='epochs=6,None'), 1), (dict(settings='hsm_maps=[slic-5,slic-10],slic-5', methods='hsl'), 2)])
def test_the_same_run_is_there_once(given, n): assert len(planned(SweepOptions(**(dict(methods='ssp', targets='isic') | given)))) == n

@pytest.mark.parametrize('given,said', [
    (dict(seeds='2-1'), "seeds='2-1': expected whole numbers"), (dict(seeds='a'), "seeds='a'"), (dict(seeds='-1'), "seeds='-1'"), (dict(methods=''), "methods='': name at least one"),
    (dict(methods='spp'), "unknown method 'spp'"), (dict(methods='ssp lcm'), "methods: 'lcm' has no value"), (dict(targets=';'), "targets=';': name at least one"),
    (dict(targets='isik'), "unknown data set 'isik'"), (dict(settings='lr'), "settings: 'lr' has no value"), (dict(settings='lr='), "settings: 'lr=' has no value"),
    (dict(settings='lrr=1'), "settings: unknown parameter 'lrr': did you mean 'lr'"), (dict(settings='lr=fast'), "settings: lr='fast' is str, expected float"), (dict(settings='epochs=1.5'), "settings: epochs='1.5' is str"),
    (dict(settings='epochs=-1'), 'settings: epochs=-1: expected at least 0'), (dict(settings='shots=[1,5'), "settings: shots='[1,5' cannot be read"), (dict(settings='lr=1,,2'), "settings: lr='1,,2' cannot be read"),
    (dict(settings='lr=1; lr=2'), 'a parameter stands there twice'), (dict(settings='seed=1'), 'settings: seed has a place of its own, give it as -p seeds'), (dict(settings='guard=maybe'), 'settings: guard='),
    (dict(data_root='nowhere'), 'data_root=nowhere: no such folder'), (dict(engine='slurm'), "unknown value of engine 'slurm'"), (dict(retries=-1), 'retries=-1: expected at least 0')])
def test_what_cannot_be_is_refused_in_one_line(given, said):
    with pytest.raises(InputError) as e: planned(SweepOptions(**given))
    assert said in str(e.value) and '\n' not in str(e.value)

def test_an_address_is_rays(tmp_path):
    with pytest.raises(InputError, match='address=auto: only engine=ray has an address'): sweep(SweepOptions(methods='ssp', address='auto', runs=str(tmp_path)))
    assert not list(tmp_path.iterdir())

# ---- placement --------------------------------------------------------------------------------------------------------------
def test_a_worker_has_its_share_of_cores_and_one_gpu():
    four = shares(10, gpus=['2', 'GPU-ab'], per_gpu=2, among=16)
    assert [e['CUDA_VISIBLE_DEVICES'] for e in four] == ['2', 'GPU-ab', '2', 'GPU-ab'] and {e['OMP_NUM_THREADS'] for e in four} == {'4'}
    assert [e['CUDA_VISIBLE_DEVICES'] for e in shares(10, workers=1, gpus=['2', '3'], among=16)] == ['2']
    assert shares(10, workers=2, threads=3, among=4)[0]['OMP_NUM_THREADS'] == '3' and len(shares(0, among=4)) == 1
    with pytest.raises(InputError, match='workers=5: 2 GPUs with workers_per_gpu=2 take 4'): shares(10, workers=5, gpus=['0', '1'], per_gpu=2)

# ---- the live table ---------------------------------------------------------------------------------------------------------
def test_the_board_tells_each_change_once_and_keeps_a_record(tmp_path):
    grid = [Cell(s) for s in planned(SweepOptions(methods='ssp', settings='lr=0.1,0.2', targets='isic'))]
    said, shown = [], []
    board = Board(grid, tmp_path/'sweep.json', dict(options={}), said.append, shown.append, every=0.)
    def turn(c, **what):
        for k, v in what.items(): setattr(c, k, v)
        board.change(c)
    turn(grid[0], status='running', where='worker 1', attempts=1)
    turn(grid[0], said='epoch 1/6')
    turn(grid[0], status='waiting', said='lost; start 2 of 3 follows')
    turn(grid[0], status='running', attempts=2)
    turn(grid[0], status='done', result=dict(run='runs/ssp-0', found=False), seconds=90., said='')
    turn(grid[1], status='failed', said='lr=0.2: no', trace='Traceback')
    assert len(said) == 5 and len(shown) == 6 and 'ssp lr=0.1 seed=0  running  on worker 1  (1 waiting, 1 running)' in said[0] and 'lost; start 2 of 3' in said[1] and 'failed  lr=0.2: no' in said[4]
    assert shown[1].said[0] == 'epoch 1/6'
    kept = json.loads((tmp_path/'sweep.json').read_text())
    assert kept['counts'] == dict(done=1, failed=1) and [c['status'] for c in kept['cells']] == ['done', 'failed'] and kept['cells'][0]['run'] == 'ssp-0' and kept['cells'][1]['trace'] == 'Traceback'

# ---- real runs --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def small(miniature): return dict(settings='backbone=miniature; weights=none; size=32; epochs=2; fit_episodes=16; test_episodes=6; track_episodes=6; shots=1; samples=0; device=cpu', targets='isic', data_root=str(miniature))

TIMES = ['seconds', 'fit_seconds']

@pytest.mark.slow
def test_runs_of_a_sweep_whose_worker_is_killed_are_those_of_train(small, tmp_path, one_thread):       # sums of another number of threads differ in the last bit
    o, killed, said = SweepOptions(methods='ssp; prototype', workers=1, threads=1, runs=str(tmp_path/'swept'), **small), [], []
    def kill(line):
        said.append(line)
        if 'running' in line: killed.append(line)
    def show(frame):
        if len(killed) == 2 and (frame.said == 'epoch 1/2').any():                           # the second run, with an epoch behind it
            killed.append('now')
            for p in Path('/proc').glob('[0-9]*'):
                try: words = (p/'cmdline').read_text().split('\0'), (p/'stat').read_text().rsplit(')', 1)[1].split()
                except OSError: continue
                if words[1][1] == str(os.getpid()) and 'cdfss.engine.grid:run_cell' in words[0]: os.kill(int(p.name), signal.SIGKILL)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sweeps, 'Board', functools.partial(Board, every=0.))                     # every line is shown
        done = sweep(o, kill, show)
    assert 'now' in killed and [c.attempts for c in done.grid] == [1, 2] and not done.failed and any('SIGKILL' in l for l in said)
    for c in done.grid:
        a, b = Run(c.result['run']), train(TrainSettings.make(c.value | dict(runs=str(tmp_path/'alone'))), say=lambda line: None)
        assert a.path.name == b.path.name and (a.path/'metrics.json').read_bytes() == (b.path/'metrics.json').read_bytes()
        assert (a.path/'weights.safetensors').read_bytes() == (b.path/'weights.safetensors').read_bytes()
        pd.testing.assert_frame_equal(a.history.drop(columns=TIMES, errors='ignore'), b.history.drop(columns=TIMES, errors='ignore'))
    [table] = done.tables()
    assert list(table.index) == ['ssp', 'prototype'] and list(table.columns) == ['isic 1-shot']
    assert json.loads(done.record.read_text())['counts'] == dict(done=2)

@pytest.mark.slow
def test_the_notebook_goes_on_where_it_was(small, tmp_path):
    papermill = shutil.which('papermill', path=str(Path(sys.executable).parent))
    book, root = tmp_path/'out.ipynb', Path(__file__).parent.parent
    first = train(TrainSettings.make(planned(SweepOptions(methods='ssp', **small | dict(settings=small['settings'].replace('epochs=2', 'epochs=0'))))[0] | dict(runs=str(tmp_path/'runs'))), say=lambda line: None)
    given = dict(methods='ssp; ssp lr=1e30 epochs=1', workers=1, runs=str(tmp_path/'runs'), **small | dict(settings=small['settings'].replace('epochs=2', 'epochs=0')))
    r = subprocess.run([papermill, str(root/'nbs'/'sweep.ipynb'), str(book), *(a for k, v in given.items() for a in ('-p', k, str(v)))], capture_output=True, text=True, timeout=500)
    text = book.read_text()
    assert first.path.name in text and 'found finished' in text and 'isic 1-shot' in text
    last = r.stderr.strip().split('\n')[-1]
    assert r.returncode == 1 and last.startswith('SystemExit: error: 1 of 2 runs failed, the first: ssp'), r.stderr[-2000:]
    kept = json.loads(next((tmp_path/'runs').glob('sweep-*.json')).read_text())
    assert [c['status'] for c in kept['cells']] == ['found finished', 'failed'] and kept['cells'][1]['starts'] == 1
