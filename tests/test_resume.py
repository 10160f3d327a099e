"Runs repeat to the byte, survive being killed at any moment, and never leave a half result that looks whole."
import errno, multiprocessing, random, shutil, signal
from pathlib import Path
import numpy as np
import pandas as pd
import pytest, torch
from cdfss.basics import InputError, atomic_write
from cdfss.data.images import ImageStore
from cdfss.data.layouts import open_dataset
from cdfss.engine import fit as fit_module, runs as runs_module, train as train_module
from cdfss.engine.fit import FitOptions, fit
from cdfss.engine.grid import run_cell
from cdfss.engine.runs import Run, load_state_file, save_state
from cdfss.engine.train import TrainSettings, load_segmenter, open_run, prepare, resolve, train
from episodes import segmenter
from trainer import work

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.slow]

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['cdfss.engine.train'])                       # imported once, forked for every start

@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cache')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('CDFSS_CACHE', str(folder))
        yield str(folder)

@pytest.fixture(scope='module')
def values(miniature):
    return dict(data_root=str(miniature), backbone='miniature', weights='none', size=64, epochs=2, fit_episodes=32, lr=.003, batch=8, test_episodes=12,
                track_episodes=12, samples=1, targets='isic,chest', shots='1')

def training(values, cache, runs, end=None, kill=None) -> tuple[int, dict[str, int]]:
    "Exit code and events (with calls so far) of a process that trains; it is killed when it says `kill`, or kills itself as `end` says (see `work`)."
    near, far = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(values | dict(runs=str(runs)), cache, far, end))
    process.start()
    far.close()
    events = {}
    while True:
        try: event, calls = near.recv()
        except EOFError: break
        events.setdefault(event, calls)
        if kill and event.startswith(kill): process.kill()
    process.join()
    return process.exitcode, events

def found(events, start) -> str|None: return next((e for e in events if e.startswith(start)), None)

def finished(values, cache, runs) -> Run:
    code, events = training(values, cache, runs)
    end = found(events, 'done')
    assert code == 0 and end, list(events)
    run = Run(end.removeprefix('done '))
    run.left = lambda start: events[end] - events[found(events, start)]
    return run

TIMES = ['seconds', 'fit_seconds']
def same(a:Run, b:Run, but=frozenset()):
    "Two run folders hold the same run: to the byte, but for clock times and the files named."
    assert a.path.name == b.path.name and {p.name for p in a.path.iterdir()} - but == {p.name for p in b.path.iterdir()} - but
    for name in ('metrics.json', 'weights.safetensors', 'weights.json', 'samples.npz', *(f'manifests/{p.name}' for p in (a.path/'manifests').iterdir())):
        assert (a.path/name).read_bytes() == (b.path/name).read_bytes(), name
    for f, g in ((a.episodes, b.episodes), (a.history, b.history), *[[pd.read_parquet(r.path/'followed.parquet') for r in (a, b)]]):
        pd.testing.assert_frame_equal(f.drop(columns=TIMES, errors='ignore'), g.drop(columns=TIMES, errors='ignore'))

@pytest.fixture(scope='module')
def undisturbed(values, cache, tmp_path_factory): return finished(values, cache, tmp_path_factory.mktemp('a'))

def test_a_run_is_whole(undisturbed, values):
    assert undisturbed.complete and not (undisturbed.path/'resume').exists()
    assert {'params.json', 'env.json', 'metrics.json', 'timing.json', 'weights.json', 'weights.safetensors', 'history.csv', 'episodes.parquet', 'followed.parquet',
            'samples.npz', 'manifests'} <= {p.name for p in undisturbed.path.iterdir()}
    assert not [p for p in undisturbed.path.rglob('*') if p.suffix in ('.part', '.damaged')]
    assert undisturbed.history.epoch.tolist() == [0, 1, 2] and undisturbed.params['epochs'] == 2
    found = undisturbed.metrics['results']
    assert {(r['target'], r['shot'], r['method'], r['episodes']) for r in found} == {(t, 1, m, 12) for t in ('isic', 'chest') for m in ('ssp', 'ssp+lcm')}
    assert len(undisturbed.episodes) == 4*12 and all(0 <= r['low'] <= r['class_miou'] <= r['high'] <= 100 for r in found)
    moved = load_segmenter(undisturbed).state_dict()
    torch.manual_seed(0)
    fresh = train_module.segmenter_of(resolve(TrainSettings(**values))).state_dict()
    assert moved.keys() == fresh.keys() and not torch.equal(moved['backbone.stages.stem.conv1.0.weight'], fresh['backbone.stages.stem.conv1.0.weight'])

def test_the_same_settings_give_the_same_bytes(undisturbed, values, cache, tmp_path): same(undisturbed, finished(values, cache, tmp_path))

def test_another_seed_gives_another_run(undisturbed, values, cache, tmp_path):
    s = resolve(TrainSettings(**values | dict(seed=1, runs=str(tmp_path))))
    assert open_run(s, prepare(s)).path.name != undisturbed.path.name

# ---- killed -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('seed', [0, 1])
def test_killed_again_and_again_the_run_ends_the_same(undisturbed, values, cache, tmp_path, seed):
    chance, run, left = random.Random(seed), Run(tmp_path/undisturbed.path.name), undisturbed.left
    epoch, block = left('epoch 0') - left('epoch 1'), left('evaluating isic') - left('evaluating chest')
    # progress adds up over the starts, so the later moments lie closer to their event
    for event, most in (('epoch 0', epoch), ('epoch 0', .6*epoch), ('epoch 1', .3*epoch), ('epoch 1', None), ('epoch 2', block), ('evaluating isic', .7*block),
                        ('evaluating chest', .6*left('evaluating chest'))):
        when = dict(kill=event) if most is None else dict(end=(event, chance.randint(1, int(most))))
        code, events = training(values, cache, tmp_path, **when)
        assert code == -signal.SIGKILL and found(events, event) and not found(events, 'done'), (when, code, list(events))
        assert not run.complete
    assert (run.path/'resume'/'state.pt').exists()
    last = finished(values, cache, tmp_path)
    assert last.path == run.path
    same(undisturbed, last)

def test_a_second_process_on_the_folder_is_refused(undisturbed, values, cache, tmp_path):
    run = Run(tmp_path/undisturbed.path.name)
    with run.working():
        code, events = training(values, cache, tmp_path)
    said = found(events, 'refused')
    assert str(run.path) in said and 'another process is working in this run folder' in said and '\n' not in said
    assert not run.complete and not (run.path/'weights.safetensors').exists()
    with run.working(): pass                                                 # and it is free again

def test_what_a_killed_process_left_half_written_is_cleared(tmp_path):
    (tmp_path/'resume').mkdir()
    for p in (tmp_path/'.metrics.json.abc.part', tmp_path/'resume'/'.state.pt.def.part', tmp_path/'kept.part'): p.write_text('half')
    with Run(tmp_path).working(): assert {p.name for p in tmp_path.rglob('*part*')} == {'kept.part'}

def test_a_finished_run_computes_nothing(undisturbed, values, cache, monkeypatch):
    def never(*_, **__): raise AssertionError('computed again')
    before = {p: p.stat().st_mtime_ns for p in undisturbed.path.rglob('*')}
    for f in ('fit', 'evaluate', 'features_for', 'save_weights'): monkeypatch.setattr(train_module, f, never)
    said, rows = [], []
    again = train(TrainSettings(**values | dict(runs=str(undisturbed.path.parent))), on_epoch=rows.append, say=said.append)
    assert again.path == undisturbed.path and 'finished before' in said[-1] and [r['epoch'] for r in rows] == [0, 1, 2]
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.path.rglob('*')}

def test_a_faulty_picture_found_later_leaves_no_result(values, cache, tmp_path, monkeypatch):
    def broken(*_, **__): raise InputError('no')
    monkeypatch.setattr(train_module, 'evaluate', broken)
    with pytest.raises(InputError): train(TrainSettings(**values | dict(runs=str(tmp_path), epochs=0, track='none')), say=lambda _: None)
    assert [Run(p).complete for p in tmp_path.iterdir()] == [False]

# ---- the resume state, close by ---------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def store(miniature, tmp_path_factory): return ImageStore(open_dataset('voc', miniature, 'trn'), 32, cache=tmp_path_factory.mktemp('decoded'))

def trained(store, state_file=None, epochs=3):
    "Weights, and rows without times, after a fit; the state is saved at every step."
    seg = segmenter('ssp+lem', bn='train')
    rows = list(fit(seg, store, FitOptions(epochs=epochs, fit_episodes=12, lr=.01, batch=4), seed=3, state_file=state_file, save_every=0.0))
    return seg.state_dict(), [{k: v for k, v in r.items() if k not in ('fit_seconds', 'restored')} for r in rows]

@pytest.fixture(scope='module')
def reference(store):
    torch.set_num_threads(1)
    return trained(store)

def equal(a, b): assert a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())

class Stop(BaseException): pass

def stopped(store, state_file, monkeypatch, at):
    "A fit that is stopped when it asks for batch number `at`."
    count, real = [0], fit_module.read_batch
    def counting(*a, **kw):
        count[0] += 1
        if count[0] == at: raise Stop
        return real(*a, **kw)
    with monkeypatch.context() as m:
        m.setattr(fit_module, 'read_batch', counting)
        with pytest.raises(Stop): trained(store, state_file)

@pytest.mark.parametrize('at', [1, 2, 3, 4, 5, 7, 9])
def test_a_fit_stopped_at_any_step_continues(store, reference, tmp_path, monkeypatch, at):
    state = tmp_path/'state.pt'
    stopped(store, state, monkeypatch, at)
    assert state.exists() == (at > 1)
    equal(trained(store, state), reference)
    again = load_state_file(state)
    assert len(again['history']) == 3 and again['step'] == 0
    equal(trained(store, state), reference)                                  # complete: all rows restored, no step taken

@pytest.mark.parametrize('at', [1, 2, 4])
def test_a_state_that_cannot_be_written_leaves_the_one_before(store, reference, tmp_path, monkeypatch, at):
    state, real, count = tmp_path/'state.pt', Path.write_bytes, [0]
    def full(path, data):
        count[0] += 1
        if count[0] < at: return real(path, data)
        real(path, data[:3000])
        raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(Path, 'write_bytes', full)
        with pytest.raises(InputError, match='the disk is full'): trained(store, state)
    assert sorted(p.name for p in tmp_path.iterdir()) == {1: [], 2: ['state.pt'], 4: ['state.before.pt', 'state.pt']}[at]
    if at > 1: assert load_state_file(state)['step'] == at - 1
    equal(trained(store, state), reference)

@pytest.mark.parametrize('damage', ['truncated', 'flipped weight', 'empty', 'text'])
def test_a_damaged_state_is_set_aside(store, reference, tmp_path, monkeypatch, capsys, damage):
    state = tmp_path/'state.pt'
    stopped(store, state, monkeypatch, 6)
    content = bytearray(state.read_bytes())
    if damage == 'truncated': content = content[:len(content)*2//3]
    elif damage == 'empty': content = b''
    elif damage == 'text': content = b'not a state'
    else:
        weight = load_state_file(state)['model']['backbone.stages.stage3.layer3.0.conv1.weight'].flatten()[:64].numpy().tobytes()
        content[content.index(weight) + 2] ^= 1
    state.write_bytes(content)
    equal(trained(store, state), reference)
    said = capsys.readouterr().err.strip().split('\n')
    assert len(said) == 1 and 'state.pt is damaged' in said[0] and 'set aside' in said[0]
    assert state.with_suffix('.damaged').exists()

def test_no_flipped_byte_of_a_state_is_believed(tmp_path, capsys):
    value = dict(model=segmenter('ssp').state_dict(), step=3, history=[{'epoch': 1, 'loss': .5}])
    save_state(tmp_path/'s.pt', value)
    whole, chance = (tmp_path/'s.pt').read_bytes(), random.Random(0)
    seen = 0
    for _ in range(40):
        content = bytearray(whole)
        content[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        (tmp_path/'s.pt').write_bytes(content)
        got = load_state_file(tmp_path/'s.pt')
        seen += got is None
        if got is not None:                                                  # a byte of padding
            assert got['step'] == 3 and got['history'] == value['history'] and all(torch.equal(got['model'][k], v) for k, v in value['model'].items())
    assert seen > 30 and load_state_file(tmp_path/'s.pt.none') is None

def test_a_state_with_code_is_not_run(tmp_path, capsys):
    from test_backbones import Trap
    torch.save({'model': Trap(tmp_path/'sprung')}, tmp_path/'state.pt')
    assert load_state_file(tmp_path/'state.pt') is None and not (tmp_path/'sprung').exists()

# ---- records ----------------------------------------------------------------------------------------------------------------
def test_atomic_write_is_all_or_nothing(tmp_path):
    path = atomic_write(tmp_path/'a'/'f.txt', 'old')
    def half(p):
        Path(p).write_text('ne')
        raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(InputError, match='the disk is full; free some space') as e: atomic_write(path, half)
    assert str(path) in str(e.value) and '\n' not in str(e.value)
    assert path.read_text() == 'old' and [p.name for p in path.parent.iterdir()] == ['f.txt']
    atomic_write(path, lambda p: Path(p).write_text('new'))
    assert path.read_text() == 'new' and path.stat().st_mode & 0o777 == 0o644

def test_records_that_are_missing_or_damaged_say_so(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(InputError, match='no metrics.json; is this a run folder'): run.metrics
    (tmp_path/'params.json').write_text('{"method": ')
    with pytest.raises(InputError, match='params.json is not readable JSON'): run.params

def test_weights_that_do_not_fit_are_refused(undisturbed, tmp_path):
    import shutil
    copy = Run(shutil.copytree(undisturbed.path, tmp_path/'run'))
    weights = copy.path/'weights.safetensors'
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match='weights.safetensors is not what the run wrote'): load_segmenter(copy)
    (copy.path/'files.json').unlink()                                        # a run made before the records were summed
    with pytest.raises(InputError, match='weights.safetensors: cannot be read'): load_segmenter(copy)
    weights.unlink()
    with pytest.raises(InputError, match='weights.safetensors'): load_segmenter(copy)
    with pytest.raises(InputError, match='no weights.json'): load_segmenter(tmp_path)

def test_a_grid_does_not_take_a_damaged_run_for_a_finished_one(undisturbed, values, cache, tmp_path):
    run = Run(shutil.copytree(undisturbed.path, tmp_path/undisturbed.path.name))
    settings = values | dict(runs=str(tmp_path), workers=1)
    assert run.whole and run_cell(settings)['found']
    (run.path/'history.csv').write_bytes((run.path/'history.csv').read_bytes().replace(b'1', b'2', 1))
    assert run.complete and not run.whole and not run_cell(settings)['found'] and run.whole
    assert run_cell(settings)['found']
