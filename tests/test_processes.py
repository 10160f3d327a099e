"Several processes share a run: the record is that of one process, whoever starts them, and whatever stops them."
import multiprocessing, os, signal, sys, time
import numpy as np
import pandas as pd
import pytest, torch
from safetensors.torch import load_file
from cdfss.basics import InputError
from cdfss.engine.fit import FitOptions, fit
from cdfss.engine.processes import ALONE, Together, joined, launched
from cdfss.engine.runs import Run
from cdfss.engine.train import TrainSettings, train
from cdfss.models.segmenter import IGNORE, cross_entropy, sharing
from episodes import segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

# ---- close by -----------------------------------------------------------------------------------------------------------------
def test_shares_are_equal_or_everyone_takes_all():
    whole = list(range(8))
    assert [Together(r, 2).share(whole) for r in range(2)] == [whole[:4], whole[4:]] and ALONE.share(whole) == whole
    assert [Together(r, 2).share(whole[:3]) for r in range(2)] == [whole[:3]] * 2

def test_the_mean_of_the_shares_is_the_loss_of_the_batch():
    g = torch.Generator().manual_seed(0)
    scores, target = torch.randn(4, 2, 5, 5, generator=g, requires_grad=True), torch.randint(2, (4, 5, 5), generator=g)
    target[:2, :3], target[2] = IGNORE, IGNORE                                          # other numbers of pixels in the halves
    whole = cross_entropy(scores, target)
    counted = (target != IGNORE).sum()
    half = lambda: sum(cross_entropy(s, t) for s, t in zip(scores.split(2), target.split(2))) / 2
    with sharing(lambda n: counted, 2): shared = half()
    assert torch.allclose(shared, whole) and not torch.allclose(half(), whole, rtol=.002)
    assert all(torch.allclose(*(torch.autograd.grad(v, scores, retain_graph=True)[0] for v in (a, whole))) for a in (shared, cross_entropy(scores, target)))
    with sharing(lambda n: 0 * n, 2): assert cross_entropy(scores, torch.full_like(target, IGNORE)) == 0

def test_what_cannot_be_shared_is_refused(miniature, tmp_path):
    from cdfss.data.images import ImageStore
    from cdfss.data.layouts import open_dataset
    store = ImageStore(open_dataset('voc', miniature, 'trn'), 32, cache=tmp_path)
    asked = lambda seg, count: next(fit(seg, store, FitOptions(epochs=1, fit_episodes=8), seed=0, together=Together(0, count, 'cpu')))
    with pytest.raises(InputError, match='batch=8: 3 processes cannot take equal shares'): asked(segmenter('ssp'), 3)
    with pytest.raises(InputError, match=r'bn=train: \d+ batch norms .* would see a share of the batch in each of 2 processes'): asked(segmenter('ssp', bn='train'), 2)

def test_without_accelerate_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    assert joined() is ALONE
    with pytest.raises(InputError, match='processes=2: accelerate, which starts and connects the processes, is not installed'): launched(print, (), 2, 'cpu', {})
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(InputError, match='WORLD_SIZE=2: accelerate'): joined()

# ---- two processes on a CPU ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def values(miniature):
    return dict(method='ssp+lem', data_root=str(miniature), backbone='miniature', size=64, epochs=2, fit_episodes=13, lr=.003, batch=4, test_episodes=8, track_episodes=8, samples=1, targets='isic',
                shots='1', device='cpu')                                                # the last batch of an epoch is one episode

@pytest.fixture(scope='module')
def one(values, tmp_path_factory): return train(TrainSettings(**values, runs=str(tmp_path_factory.mktemp('one'))), say=lambda _: None)

def alike(run:Run, one:Run):
    "The same record, up to the order of additions."
    assert run.complete and run.path.name == one.path.name and {p.name for p in run.path.iterdir()} == {p.name for p in one.path.iterdir()}
    a, b = (load_file(r.path/'weights.safetensors') for r in (run, one))
    assert a.keys() == b.keys() and all(torch.allclose(v, b[n], atol=1e-4) for n, v in a.items())
    drop = lambda r: r.history[[c for c in r.history if c.startswith('loss')]].to_numpy()[1:]
    assert np.allclose(drop(run), drop(one), atol=1e-4) and len(run.history) == len(one.history)
    found, wanted = (pd.DataFrame(r.metrics['results']) for r in (run, one))
    assert np.allclose(found.class_miou, wanted.class_miou, atol=.5) and run.metrics['manifests'] == one.metrics['manifests']
    pd.testing.assert_frame_equal(run.episodes[['query', 'supports', 'cls', 'index']], one.episodes[['query', 'supports', 'cls', 'index']])

@pytest.mark.slow
def test_two_processes_give_the_run_of_one(one, values, tmp_path, capfd):
    rows, said = [], []
    run = train(TrainSettings(**values, runs=str(tmp_path), processes=2), on_epoch=rows.append, say=said.append)
    alike(run, one)
    assert [r['epoch'] for r in rows] == [0, 1, 2] and any('evaluating isic' in line for line in said)             # told here, by the first process alone
    assert len([line for line in said if 'evaluating isic' in line]) == 1 and run.env['processes'] == 2 and 'processes' not in one.env

def _launch(words, out):
    "`accelerate launch` as the shell starts it, in a process group of its own."
    os.setsid()
    sys.stdout = sys.stderr = open(out, 'w', buffering=1)
    os.dup2(sys.stdout.fileno(), 1); os.dup2(sys.stdout.fileno(), 2)
    from accelerate.commands.accelerate_cli import main
    sys.argv = ['accelerate', 'launch', *words]
    main()

def living(root:int) -> list[int]:
    "A process and those it started, theirs too, that have not ended (torchrun gives each worker a group of its own)."
    above, ended = {}, set()
    for p in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{p}/stat') as f: state, parent = f.read().rsplit(') ', 1)[1].split()[:2]
        except OSError: continue
        above[int(p)] = int(parent)
        if state == 'Z': ended.add(int(p))
    found, new = set(), {root} & above.keys()
    while new: found, new = found | new, {p for p, q in above.items() if q in new} - found - new
    return sorted(found - ended)

def alive(pids:list[int]) -> list[int]: return [p for p in pids if p in living(p)]

@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc'), reason='looks at processes in /proc')
def test_a_launch_that_is_told_to_stop_stops_everywhere_and_one_process_goes_on(one, values, tmp_path):
    words = ['--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0', '-m', 'cdfss', 'train']
    words += [f'{k}={v}' for k, v in (values | dict(runs=str(tmp_path/'runs'))).items()]
    launcher = multiprocessing.get_context('fork').Process(target=_launch, args=(words, tmp_path/'out'))
    launcher.start()
    state, end = tmp_path/'runs'/one.path.name/'resume'/'state.pt', time.time() + 300
    while not state.exists() and launcher.is_alive() and time.time() < end: time.sleep(.05)
    said = (tmp_path/'out').read_text()
    assert state.exists(), said[-3000:]
    group = living(launcher.pid)
    assert len(group) >= 3                                                               # the launcher and two that work
    os.kill(launcher.pid, signal.SIGTERM)
    launcher.join(60)
    while alive(group) and time.time() < end: time.sleep(.05)
    assert launcher.exitcode != 0 and not alive(group) and not Run(state.parent.parent).complete
    assert said.count('after each source epoch') == 1                                    # one process speaks
    rows = []
    alike(train(TrainSettings(**values, runs=str(tmp_path/'runs')), on_epoch=rows.append, say=lambda _: None), one)
    assert rows[1].get('restored') and rows[1]['epoch'] == 1
