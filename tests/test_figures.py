"Figures from the records of a made-up study: all are drawn, the same bytes come twice, what lacks records is left out in words."
import importlib, inspect, json
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt, pandas as pd, pytest
from cdfss.basics import InputError, write_json
from cdfss.diagnostics.diagnosis import QUESTIONS
from cdfss.engine.runs import Run
from cdfss.engine.train import TrainSettings
from cdfss.report.figures import FIGURES, PLANS, Study, StudyOptions, make, over_seeds, run_study
from studies import made_up

ABLATIONS = {'hsl', 'ifa'}                                            # drawn in tests/test_ablations.py

@pytest.fixture(scope='module')
def study(tmp_path_factory): return made_up(tmp_path_factory.mktemp('runs'))

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

@pytest.fixture(scope='module')
def drawn(study, tmp_path_factory):
    "Two folders into which everything was drawn, from records read anew each time, and what was said."
    folders, said = [tmp_path_factory.mktemp('figures') for _ in range(2)], []
    for f in folders: make(Study.read(study.runs[0].path.parent), f, say=said.append)
    return folders, said

def test_every_figure_is_drawn_with_its_numbers_and_runs(drawn):
    (folder, _), said = drawn
    assert {s.split(':')[0] for s in said if 'left out' in s} == ABLATIONS
    for name in set(FIGURES) - ABLATIONS:
        for kind in ('png', 'svg', 'csv'): assert (folder/f'{name}.{kind}').stat().st_size > 100, f'{name}.{kind}'
        runs = (folder/f'{name}_runs.txt').read_text()
        assert runs.startswith('runs: hsnet+' if name.startswith('lfm') else 'runs: ssp+') and 'commit 01234567' in runs and 'Protocol patnet' in runs

def test_the_same_records_give_the_same_bytes(drawn):
    (a, b), _ = drawn
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir()) and len(names) > 4*len(set(FIGURES) - ABLATIONS)
    assert not [n for n in names if (a/n).read_bytes() != (b/n).read_bytes()]

def test_the_numbers_are_those_of_the_records(drawn):
    (folder, _), _ = drawn
    read = lambda name: pd.read_csv(folder/f'{name}.csv')
    s = read('sharpness')
    assert sorted(s['strength'].unique()) == [.1, .2, .5]
    s = s[s['strength'] == .2].set_index(['trained', 'target', 'stage'])
    assert s.loc[('ssp', 'isic', 'stem'), 'value'] == pytest.approx(6, abs=.5) and s.loc[('ssp+lem', 'isic', 'stem'), 'value'] == pytest.approx(5, abs=.5)
    assert (s['seeds'] == 2).all() and (s['low'] < s['value']).all()
    a = read('ablation').set_index(['method', 'target'])['value']
    assert a['ssp+lem+lcm', 'mean'] - a['ssp+lem', 'mean'] == pytest.approx(3, abs=1.5)
    assert set(read('cka')['trained']) == {'pretrained', 'ssp', 'ssp+lem'} and len(read('frequency')) == 4*2*9
    f = read('freezing')
    assert f[(f['freeze'] == 'stem+stage1') & (f['target'] == 'isic')]['change'].iloc[0] == pytest.approx(4, abs=1.5)
    assert set(read('predictions')['method']) == {'ssp', 'ssp+lcm'}

def test_what_has_no_records_is_left_out_in_words(tmp_path):
    study, said = made_up(tmp_path/'runs', seeds=(0,)), []
    for p in (tmp_path/'runs').glob('*/diagnostics/*/cka/how.json'): p.unlink()
    made = make(study, tmp_path/'figures', ('cka', 'ablation'), said.append)
    assert list(made) == ['ablation'] and 'cka: left out' in said[0] and 'make study' in said[0] and not (tmp_path/'figures'/'cka.png').exists()
    with pytest.raises(InputError, match="unknown figure 'ablatoin': did you mean 'ablation'"): make(study, tmp_path/'figures', ('ablatoin',))

def test_a_study_must_be_there_and_finished(tmp_path):
    with pytest.raises(InputError, match='no study there: run `make study`'): Study.read(tmp_path)
    study = made_up(tmp_path, seeds=(0,))
    assert [r.path.name for r in Study.read(tmp_path).part('loec').runs] == json.loads((tmp_path/'study-loec.json').read_text())['runs']
    (study.runs[1].path/'metrics.json').unlink()
    with pytest.raises(InputError, match='no metrics.json'): Study.read(tmp_path)
    with pytest.raises(InputError, match='without runs'): Study([])

def test_studies_in_a_folder_are_read_together_and_apart(tmp_path):
    study = made_up(tmp_path, seeds=(0,))
    Study(study.runs[:1]).write('lfm', tmp_path)
    both = Study.read(tmp_path)
    assert [r.path.name for r in both.runs] == [r.path.name for r in study.part('loec').runs] and [r.path.name for r in both.part('lfm').runs] == [study.runs[0].path.name]
    (tmp_path/'study-loec.json').unlink()
    with pytest.raises(InputError, match="'loec' is not there: run `make study`"): Study.read(tmp_path).part('loec')
    assert len(Study(study.runs).part('lfm').runs) == len(study.runs)

def test_over_seeds_has_no_invented_interval():
    frame = pd.DataFrame(dict(target=['a', 'a', 'b'], seed=[0, 1, 0], v=[1., 3., 5.]))
    a, b = over_seeds(frame, 'v', ['target']).to_dict('records')
    assert (a['value'], a['seeds']) == (2, 2) and a['low'] < 1 and a['high'] > 3
    assert b['value'] == 5 and pd.isna(b['low']) and pd.isna(b['high'])

@pytest.mark.parametrize('name', sorted(PLANS))
def test_a_plan_asks_for_runs_and_diagnostics_that_exist(name, tmp_path):
    plan = PLANS[name](StudyOptions(seeds='0,1', epochs=1, runs='here'))
    made = [TrainSettings.make(s) for s in plan.runs]
    assert {m.seed for m in made} == {0, 1} and {m.epochs for m in made} == {1} and {m.runs for m in made} == {'here'}
    write_json(tmp_path/'params.json', dict(method=made[0].method, freeze=made[0].freeze))
    asked = plan.inside(Run(tmp_path))
    assert (asked or name in ABLATIONS | {'variants'}) and set(asked) <= set(QUESTIONS)
    for n, options in asked.items():
        known = inspect.signature(importlib.import_module(f'cdfss.diagnostics.{n}').study).parameters
        assert set(options) <= set(known) or 'options' in known, n

def test_a_study_follows_its_plan(monkeypatch, tmp_path):
    study, asked = made_up(tmp_path, seeds=(0,)), []
    monkeypatch.setattr('cdfss.report.figures.run_grid', lambda settings, workers, say: study.runs[:len(settings)])
    monkeypatch.setattr('cdfss.report.figures.diagnose_runs', lambda jobs, workers, say: asked.extend(jobs))
    run_study(StudyOptions(seeds='0', runs=str(tmp_path/'elsewhere')))
    assert [(r.path.name, recipe) for r, recipe, _ in asked] == [('ssp+lcm-none-0', 'ssp'), ('ssp+lem+lcm-none-0', 'ssp+lem')]
    assert 'frequency' in asked[0][2] and 'frequency' not in asked[1][2] and (tmp_path/'elsewhere'/'study-loec.json').exists()
