"A few trials of each kind of the fault campaign, and single faults that it found."
import random, shutil, signal
import pandas as pd
import pytest
import campaign as campaign_module
from campaign import KINDS, Campaign, differences
from cdfss.basics import InputError
from cdfss.engine import runs as runs_module, train as train_module
from cdfss.engine.runs import Run
from cdfss.engine.train import TrainSettings, load_segmenter, train

pytestmark = [pytest.mark.usefixtures('one_thread'), pytest.mark.slow]

@pytest.fixture(scope='module')
def campaign(tmp_path_factory): return Campaign(tmp_path_factory.mktemp('campaign'))

@pytest.mark.parametrize('kind', KINDS)
def test_a_trial_ends_as_the_undisturbed_run(campaign, kind):
    trial = campaign.try_out(kind, 0)
    assert not trial.faults, (trial.detail, trial.outcome, trial.faults)

def test_the_campaign_sees_what_is_wrong(campaign, tmp_path):
    "A folder that is said to be complete and is not the undisturbed run is a fault, whatever differs."
    for name in ('history.csv', 'episodes.parquet', 'weights.safetensors', 'epochs/1.safetensors', 'manifests/kvasir-1shot.json', 'samples.npz', 'metrics.json'):
        copy = Run(shutil.copytree(campaign.reference.path, tmp_path/name.replace('/', ' ')))
        assert not differences(campaign.reference, copy)
        if name == 'history.csv': copy.write_frame(name, copy.history.assign(loss=1.))
        elif name == 'episodes.parquet': copy.write_frame(name, copy.episodes.assign(tp=1))
        else: (copy.path/name).write_bytes((copy.path/name).read_bytes() + b' ')
        assert f'{name} differs' in differences(campaign.reference, copy), name

# ---- a finished run says when its records are not its own -----------------------------------------------------------------------
def settings(campaign, runs): return TrainSettings(**campaign_module.VALUES | dict(data_root=str(campaign.data), runs=str(runs)))

@pytest.fixture
def finished(campaign, tmp_path, monkeypatch):
    monkeypatch.setenv('CDFSS_CACHE', str(campaign.cache))
    return Run(shutil.copytree(campaign.reference.path, tmp_path/campaign.reference.path.name))

READERS = {'metrics.json': lambda r: r.metrics, 'params.json': lambda r: r.params, 'env.json': lambda r: r.env, 'history.csv': lambda r: r.history, 'episodes.parquet': lambda r: r.episodes,
           'followed.parquet': lambda r: r.followed, 'samples.npz': lambda r: r.samples, 'weights.json': load_segmenter, 'weights.safetensors': load_segmenter,
           'epochs/1.safetensors': lambda r: load_segmenter(r, epoch=1), 'files.json': lambda r: r.metrics}

@pytest.mark.parametrize('name', READERS)
def test_no_flipped_byte_of_a_finished_run_is_believed(finished, name):
    assert finished.damage() is None
    READERS[name](finished)
    path, chance = finished.path/name, random.Random(0)
    whole = path.read_bytes()
    for _ in range(8):
        content = bytearray(whole)
        content[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        assert (line := finished.damage()) and '\n' not in line
        if name == 'files.json': continue                                    # a record that is whole may be read
        with pytest.raises(InputError, match='run the same command again') as e: READERS[name](finished)
        assert str(path) in str(e.value)
    path.unlink()
    if name != 'files.json' and name != 'metrics.json': assert 'is gone' in finished.damage()

def test_a_damaged_run_is_computed_anew(finished, campaign):
    content = bytearray((finished.path/'metrics.json').read_bytes())
    at = content.index(b'"class_miou": ') + 15
    content[at] = ord('9') if content[at] != ord('9') else ord('8')
    (finished.path/'metrics.json').write_bytes(content)
    again, _ = campaign.start(finished.path.parent, campaign.cache)
    said = [e for e, _ in again.events if e.startswith('said')]
    assert 'metrics.json is not what the run wrote' in said[0] and 'computed anew' in said[0] and again.number('step') == campaign.steps
    assert not differences(campaign.reference, finished) and finished.damage() is None

def test_a_run_made_before_records_were_summed_is_believed(finished):
    (finished.path/'files.json').unlink()
    assert finished.damage() is None and finished.metrics and load_segmenter(finished)

def test_a_run_that_another_process_finished_meanwhile_is_not_computed_again(finished, campaign, monkeypatch):
    monkeypatch.setattr(train_module, '_work', lambda *_: pytest.fail('computed again'))
    seen = []
    def complete(run):
        seen.append(run)
        return len(seen) > 1                                                 # at the first look it is not finished
    monkeypatch.setattr(Run, 'complete', property(complete))
    said = []
    train(settings(campaign, finished.path.parent), say=said.append)
    assert 'nothing is computed' in said[-1]

def test_what_a_process_killed_at_the_very_end_left_is_cleared(finished, campaign):
    (finished.path/'resume').mkdir()
    train(settings(campaign, finished.path.parent), say=lambda _: None)
    assert not (finished.path/'resume').exists()

def test_features_of_a_killed_process_are_cleared(tmp_path):
    for name in ('resume/cdfss-features-abc', 'resume/final/cdfss-features-def'): (tmp_path/name).mkdir(parents=True)
    with Run(tmp_path).working(): assert not list(tmp_path.rglob('cdfss-features-*'))

# ---- in the middle ----------------------------------------------------------------------------------------------------------------
def stopped_in_epoch_2(campaign, runs):
    "A run that was killed when epoch 1 was on record, and its folder."
    running = campaign.running(runs, campaign.cache, moment=('event', 'epoch 2'), act='kill')
    assert running.wait().end == 'SIGKILL'
    return Run(runs/campaign.reference.path.name)

@pytest.mark.parametrize('name', ['followed', 'epochs'])
def test_what_an_epoch_left_is_not_made_of_later_weights(campaign, tmp_path, name):
    "When a block of a finished epoch, or its weights, are damaged, training starts anew: the weights at hand are those of a later epoch."
    run = stopped_in_epoch_2(campaign, tmp_path)
    kept = (run.path/'epochs'/'1.safetensors').read_bytes()
    assert kept == (campaign.reference.path/'epochs'/'1.safetensors').read_bytes()
    path = next((run.path/'resume'/'followed').glob('*epoch1*.parquet')) if name == 'followed' else run.path/'epochs'/'1.safetensors'
    path.write_bytes(path.read_bytes()[:-9])
    last, _ = campaign.start(tmp_path, campaign.cache)
    assert last.end == 'done' and last.said('said ') and any('source training starts anew' in e for e, _ in last.events)
    assert not differences(campaign.reference, run)

def test_the_state_before_is_used_when_the_last_is_damaged(campaign, tmp_path):
    run = stopped_in_epoch_2(campaign, tmp_path)
    state = run.path/'resume'/'state.pt'
    state.write_bytes(state.read_bytes()[:2000])
    last, _ = campaign.start(tmp_path, campaign.cache)
    assert last.end == 'done' and last.number('step') <= 1, 'one step is done again, not all of them'
    assert not differences(campaign.reference, run)
