"Subjects, what is kept beside a run, and the diagnose notebook as a user starts it."
import json, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest
from cdfss.basics import InputError, write_json
from cdfss.diagnostics import diagnosis
from cdfss.diagnostics.subject import open_subject
from cdfss.engine.runs import Run
from cdfss.engine.train import TrainSettings, epochs_kept, load_segmenter, train

SMALL = dict(targets='isic', shots='1', test_episodes=20, track_episodes=8)

@pytest.fixture(scope='module')
def run(miniature, tmp_path_factory) -> Run:
    return train(TrainSettings(method='lcm', data_root=str(miniature), size=96, backbone='miniature', epochs=1, fit_episodes=8, samples=0,
                               runs=str(tmp_path_factory.mktemp('runs')), **SMALL), say=lambda line: None)

def test_a_run_is_opened_as_it_was(run):
    subject = open_subject(run.path)
    assert subject.name == run.path.name and subject.settings.method == 'ssp+lcm' and not subject.segmenter.training
    assert {f'{t}-{k}shot': m.hash for (t, k), m in subject.manifests.items()} == run.metrics['manifests']
    own, before = (next(s.backbone.parameters()).detach() for s in (subject.segmenter, subject.pretrained()))
    assert not own.equal(before) and subject.start == 'auto'

def test_a_run_of_an_earlier_version_is_opened(run, tmp_path):
    "An option of another method that was renamed since does not matter; one of its own does."
    old = Run(shutil.copytree(run.path, tmp_path/'old'))
    (old.path/'files.json').unlink()                                           # earlier versions wrote none
    for name, wrong in (('ifa_pool', None), ('lcm_gone', r'lcm_gone: ssp\+lcm has no such option any more')):
        write_json(old.path/'params.json', run.params | {name: 'fixed'})
        write_json(old.path/'weights.json', (d := run.json('weights')) | dict(options=d['options'] | {name: 'fixed'}))
        for act in (lambda: open_subject(old.path).segmenter, lambda: load_segmenter(Run(old.path))):
            if wrong is None: assert next(act().backbone.parameters()).equal(next(load_segmenter(run).backbone.parameters()))
            else:
                with pytest.raises(InputError, match=wrong): act()

def test_epochs_that_were_kept_are_looked_at_one_by_one(run):
    settings = {k: v for k, v in run.params.items() if k in TrainSettings.__dataclass_fields__}
    kept = train(TrainSettings.make(settings | dict(epochs=2, keep_epochs=True, weights='auto', runs=str(run.path.parent))), say=lambda line: None)
    assert kept.path != run.path and epochs_kept(kept) == [0, 1, 2] and epochs_kept(run) == []
    weights = [next(load_segmenter(kept, epoch=e).backbone.parameters()).detach() for e in (0, 1, 2, None)]
    assert not weights[0].equal(weights[1]) and not weights[1].equal(weights[2]) and weights[2].equal(weights[3])
    with pytest.raises(InputError, match=r'epoch=7: .* keeps the weights of epochs \[0, 1, 2\]'): load_segmenter(kept, epoch=7)
    found = diagnosis.diagnose(kept, 'activations', episodes=4)['activations']
    assert list(found['model'].unique()) == ['pretrained', 'epoch 1', 'trained'] and found.groupby('model')['energy'].sum().nunique() == 3

def test_the_unseen_episodes_are_the_others(run):
    subject = open_subject(run.path)
    seen, rest = subject.targets['isic'][1], diagnosis.unseen(subject, 'isic')
    assert len(seen) == 8 and not set(seen.ids) & set(rest.ids)
    assert {*seen.ids, *rest.ids} == set(subject.manifests['isic', 1].ids) and 8 < len(rest) <= 12       # the rule may draw an episode twice
    subject.targets['isic'] = (subject.targets['isic'][0], subject.manifests['isic', 1])
    with pytest.raises(InputError, match='looks at all 20 test episodes'): diagnosis.unseen(subject, 'isic')

def test_what_was_computed_is_kept_until_the_question_or_the_code_changes(run, monkeypatch):
    import cdfss.diagnostics.errors as errors
    calls, real = [], errors.study
    def study(*args, **kw):
        calls.append(kw['episodes'])
        return real(*args, **kw, draws=20)
    monkeypatch.setattr(errors, 'study', study)
    subject = open_subject(run.path)
    first, again = (diagnosis.diagnose(subject, 'errors', episodes=4) for _ in range(2))
    assert calls == [4] and all(first[k].equals(again[k]) for k in first) and set(first) == set(again)
    diagnosis.diagnose(run, 'errors', episodes=4)                          # not even opened
    diagnosis.diagnose(subject, 'errors', episodes=6)
    monkeypatch.setattr(diagnosis, 'file_hash', lambda path: 'changed')
    diagnosis.diagnose(subject, 'errors', episodes=6)
    assert calls == [4, 6, 6]
    with pytest.raises(InputError, match="unknown diagnostic 'error': did you mean 'errors'"): diagnosis.diagnose(run, 'error')

def test_a_run_beside_it_is_asked_the_same(run, tmp_path):
    subject, settings = open_subject(run.path), {k: v for k, v in run.params.items() if k in TrainSettings.__dataclass_fields__}
    plain, small = (train(TrainSettings.make(settings | dict(method='ssp', weights='auto', runs=str(tmp_path), epochs=0) | kw), say=lambda line: None) for kw in ({}, dict(size=64)))
    o = diagnosis.DiagnoseOptions(run=str(run.path), beside=f'{plain.path}, {run.path}', episodes=4)
    frames = diagnosis.diagnose(subject, 'errors', **o.asked('errors'))
    assert frames['balance'].query("target == 'isic'").other.tolist() == ['prototype', 'affinity', 'ssp', 'ssp+lcm'] and 'beside' not in o.asked('sharpness')
    same = frames['balance'].query("other == 'ssp+lcm'")
    assert (same.closer == 0).all() and (same.precision_gain == 0).all()                               # the run beside itself
    assert 'lean is' in diagnosis.errors_finding(frames, 'voc', 'ssp+lcm').text or (frames['balance'].reading == 'not clear').any()
    with pytest.raises(InputError, match=r'it has size=64, the subject size=96; give a run on the same data'): diagnosis.diagnose(subject, 'errors', beside=(str(small.path),))

def test_the_target_of_a_fold_goes_by_its_own_name(tmp_path):
    subject = open_subject('ssp', protocol='pascal-5i', fold=0, test_episodes=4, shots='1', track_episodes=4, weights='none')
    found = diagnosis.diagnose(subject, 'errors', episodes=4)
    assert found['errors'].target.unique().tolist() == ['voc', 'voc-fold0'] and 'voc-fold0' in diagnosis.errors_finding(found, 'voc', 'ssp').text or 'neither' in diagnosis.errors_finding(found, 'voc', 'ssp').text

def test_stages_trains_its_runs_and_finds_them_again(run):
    subject = open_subject(run.path, runs=str(run.path.parent))
    found = diagnosis.diagnose(subject, 'stages', seeds=(0,), freeze=('none', 'stem'))
    f = found['stages']
    assert f[f.freeze == 'none'].method.unique() == ['ssp'] and set(f.freeze) == {'none', 'stem'} and np.isfinite(f[f.freeze == 'stem'].change).all() and len(found['paper']) == 15
    trained = {p.name for p in run.path.parent.glob('ssp+lcm-*')}
    assert run.path.name in trained                                        # freezing none with this seed is the run itself
    diagnosis.diagnose(open_subject(run.path, runs=str(run.path.parent)), 'stages', seeds=(0,), freeze=('none', 'stem'), episodes=6)
    assert {p.name for p in run.path.parent.glob('ssp+lcm-*')} == trained
    assert 'stem frozen' in diagnosis.read('ssp+lcm', ('stem',), 'voc', True, {'stages': found}).text and 'stages' not in diagnosis.applicable(subject)

def test_a_suggestion_is_tried(run):
    subject = open_subject(run.path)
    on = diagnosis.try_suggestion(subject, diagnosis.Reading('', 'ssp', {}), 'weights')
    assert 'on the same weights' in on.text and list(on.table.columns[:3]) == ['target', 'ssp+lcm', 'ssp'] and on.table['low'][0] <= on.table['difference'][0]
    assert 'allow it with trial=train' in diagnosis.try_suggestion(subject, diagnosis.Reading('', 'ssp+lem+lcm', {})).text              # own data: no training unasked
    trained = diagnosis.try_suggestion(subject, diagnosis.Reading('', 'ssp+lem+lcm', {}), 'train')
    assert 'One seed of training' in trained.text and any(p.name.startswith('ssp+lem+lcm-') for p in run.path.parent.iterdir())

papermill = shutil.which('papermill', path=str(Path(sys.executable).parent))

@pytest.mark.slow
def test_the_notebook(repo, run, tmp_path):
    given = [str(v) for k, v in dict(diagnostic='errors', run=run.path, episodes=6, trial='none').items() for v in ('-p', k, v)]
    done = subprocess.run([papermill, str(repo/'nbs'/'diagnose.ipynb'), 'out.ipynb', *given], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [o for c in json.loads((tmp_path/'out.ipynb').read_text())['cells'] if c['cell_type'] == 'code' for o in c['outputs']]
    text = ''.join(''.join(o.get('data', {}).get('text/markdown', '')) for o in outputs)
    assert any('image/png' in o.get('data', {}) for o in outputs) and '**errors.** The answers are' in text and 'Suggested' in text
    assert diagnosis.kept(run, 'errors')['errors']['target'].unique().tolist() == ['voc', 'isic']
