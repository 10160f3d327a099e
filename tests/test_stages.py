"Frozen against trained: the grid that is run, the table from made-up records, and a real grid that continues where it was."
import numpy as np
import pandas as pd, pytest
from cdfss.basics import InputError, write_json
from cdfss.diagnostics import stages as module
from cdfss.diagnostics.stages import PAPER, freezings, run_stages, stages, study
from cdfss.engine.grid import run_cell
from cdfss.engine.metrics import METRICS, seed_interval
from cdfss.engine.runs import Run

def a_run(root, freeze, seed, level=500, method='ssp', shots=(1,), targets=('isic', 'chest'), **changes):
    rng = np.random.default_rng([seed, *freeze.encode()])
    rows = []
    for t in targets:
        for k in shots:
            for m in (method, 'beside'):
                tp = (level + 50*(k > 1) + 20*seed + rng.normal(0, 60, 30)).clip(1, 999).astype(int) if m == method else np.full(30, 5)
                rows.append(pd.DataFrame(dict(target=t, shot=k, method=m, index=np.arange(30), cls=np.arange(30) % 3, tp=tp, fp=100, fn=1000 - tp, tn=8000)))
    run = Run(root/f'{method}-{freeze}-{seed}')
    write_json(run.path/'params.json', dict(method=method, seed=seed, freeze=freeze, epochs=changes.get('epochs', 10)))
    write_json(run.path/'metrics.json', dict(protocol=changes.get('protocol', 'patnet'), manifests={f'{t}-{k}shot': 'a'*64 for t in targets for k in shots}))
    run.write_frame('episodes.parquet', pd.concat(rows))
    return run

def test_freezings_leave_a_stage_to_train():
    assert freezings(('a', 'b', 'c')) == ['none', 'a', 'a+b'] and freezings(('a', 'b', 'c'), 'single') == ['none', 'a', 'b', 'c']
    with pytest.raises(InputError, match="did you mean 'prefix'"): freezings(kind='prefx')

def test_the_grid_is_ordinary_runs(monkeypatch):
    asked = []
    monkeypatch.setattr(module, 'run_grid', lambda settings, workers, say: asked.extend(settings) or [])
    assert run_stages((0, 1), epochs=2, method='loec') == []
    assert len(asked) == 6 and asked[0] == dict(method='loec', epochs=2, freeze='none', seed=0) and [a['freeze'] for a in asked[::2]] == ['none', 'stem', 'stem+stage1']

def test_table_is_the_metric_with_paired_changes(tmp_path):
    runs = [a_run(tmp_path, f, s, v) for f, v in (('none', 400), ('stem', 600)) for s in range(3)]
    t = stages(runs).set_index(['freeze', 'target'])
    each = {(r.params['freeze'], r.params['seed']): METRICS['class_miou'](r.episodes.query("target == 'isic' and method == 'ssp'")) for r in runs}
    assert np.allclose(t.loc[('stem', 'isic'), ['miou', 'low', 'high']].tolist(), seed_interval([each['stem', s] for s in range(3)]))
    assert np.allclose(t.loc[('stem', 'isic'), ['change', 'change_low', 'change_high']].tolist(), seed_interval([each['stem', s] - each['none', s] for s in range(3)]))
    assert np.isclose(t.miou['none', 'mean'], (t.miou['none', 'isic'] + t.miou['none', 'chest'])/2)
    assert t.reading['stem', 'isic'] == 'real: freezing is better' and t.reading['none', 'isic'] == '' and np.isnan(t.change['none', 'isic'])
    assert (t.protocol == 'patnet').all() and t.manifest['stem', 'isic'] == 'a'*8

def test_shots_and_single_seeds(tmp_path):
    runs = [a_run(tmp_path, f, 0, shots=(1, 5)) for f in ('none', 'stem')]
    one, five = stages(runs), stages(runs, shot=5)
    assert set(one.shot) == {1} and set(five.shot) == {5} and (five.miou.to_numpy() > one.miou.to_numpy()).all()
    assert one.low.isna().all() and one.change.notna().sum() == 3 and set(one.reading) == {'', 'not clear'}

def test_refusals(tmp_path):
    a = a_run(tmp_path, 'none', 0)
    with pytest.raises(InputError, match='runs is empty'): stages([])
    with pytest.raises(InputError, match='differ in protocol'): stages([a, a_run(tmp_path, 'none', 1, protocol='hsl')])
    with pytest.raises(InputError, match='differ in protocol, manifests or epochs'): stages([a, a_run(tmp_path, 'none', 1, epochs=3)])
    with pytest.raises(InputError, match='twice'): stages([a, a])

def test_the_papers_table_stands_apart(tmp_path):
    frames = study([a_run(tmp_path, f, s) for f in ('none', 'stem') for s in range(2)])
    assert 'paper' not in frames['stages'].columns and set(frames) == {'stages', 'paper'}
    at = frames['paper'].set_index(['freeze', 'target'])
    assert at.miou['stem+stage1', 'mean'] == 57.21 and np.isclose(at.change['stem+stage1', 'mean'], .57) and np.isnan(at.change['none', 'mean'])
    assert np.allclose(PAPER[['fss', 'deepglobe', 'isic', 'chest']].mean(axis=1), PAPER['mean'], atol=.01)

def test_a_real_grid_continues(tmp_path, miniature, monkeypatch):
    monkeypatch.setattr(module, 'run_grid', lambda settings, workers, say: [Run(run_cell(s)['run']) for s in settings])        # in this process: quicker
    tiny = dict(data_root=str(miniature), size=64, backbone='miniature', epochs=1, fit_episodes=8, test_episodes=6, track='none', shots='1', targets='isic', samples=0, runs=str(tmp_path), device='cpu')
    runs = run_stages((0,), ('none', 'stem'), **tiny)
    before = [(r.path/'metrics.json').stat().st_mtime_ns for r in runs]
    again = run_stages((0,), ('stem',), **tiny)
    assert [r.params['freeze'] for r in runs] == ['none', 'stem'] and again[0].path == runs[1].path and (again[0].path/'metrics.json').stat().st_mtime_ns == before[1]
    assert list(stages(runs).freeze.unique()) == ['none', 'stem']
