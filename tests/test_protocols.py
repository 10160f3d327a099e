"Protocols against the published counts, the audit on made frames, and the comparison of two made runs."
import json
import numpy as np, pandas as pd, pytest
from cdfss.basics import InputError, write_json
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import RULES, draw
from cdfss.engine.metrics import METRICS, bootstrap, bootstrap_mean, paired_bootstrap, paired_bootstrap_mean
from cdfss.engine.protocols import CHECKPOINTS, PROTOCOLS, audit, compare, protocol_table, reading
from cdfss.engine.runs import Run
from fakes import touch

# ---- protocols
@pytest.fixture(scope='module')
def tree(parity, tmp_path_factory):
    reference, root = json.loads((parity/'episodes.json').read_text()), tmp_path_factory.mktemp('reference')
    touch(root, *reference['files'])
    for name, lines in reference['split_files'].items(): touch(root, name, text='\n'.join(lines) + '\n')
    return root

def test_names_and_completeness():
    assert {'patnet', 'hsl', 'ifa', 'abcdfss', 'pascal-5i', 'coco-20i', 'balanced', 'exhaustive'} <= set(PROTOCOLS)
    for n, p in PROTOCOLS.items():
        assert p.name == n and p.rule in RULES and p.metric in METRICS and p.targets and p.seeds and p.source and bool(p.folds) == bool(p.novel) == bool(p.fold_size)
        assert all(p.describe()[k] for k in ('summary', 'training', 'test', 'episodes', 'metric', 'selection', 'supports', 'source'))
    with pytest.raises(InputError, match="did you mean 'patnet'"): PROTOCOLS['patnt']
    with pytest.raises(Exception): PROTOCOLS['patnet'].metric = 'fb_iou'                # frozen
    assert list(protocol_table(('ifa', 'patnet')).columns) == ['ifa', 'patnet']

@pytest.mark.parametrize('name', ['patnet', 'hsl', 'ifa', 'abcdfss', 'balanced', 'exhaustive'])
def test_counts_said_are_counts_drawn(tree, name):
    p = PROTOCOLS[name]
    for dataset in ('deepglobe', 'isic', 'chest', 'fss'):
        d = open_dataset(dataset, tree, p.split(dataset))
        m = p.draw(d, 1)
        assert m.rule == p.rule and m.seed == p.seeds[0]
        assert len(m) == (p.target(dataset).episodes or len(d))
    assert p.target('fss').images == 2400 and open_dataset('fss', tree, p.split('fss')).split == ('val' if name == 'ifa' else 'test')

def test_a_data_set_the_protocol_does_not_name():
    assert PROTOCOLS['patnet'].split('kvasir') is None and PROTOCOLS['ifa'].target('kvasir').dataset == 'kvasir'

@pytest.mark.parametrize('name, fold, first', [('pascal-5i', 0, (0, 1, 2, 3, 4)), ('pascal-5i', 3, (15, 16, 17, 18, 19)), ('coco-20i', 2, (2, 6, 10, 14, 18)),
                                               ('coco-20i-blocks', 2, (40, 41, 42, 43, 44)), ('coco-20i-dropped', 2, (2, 6, 10, 14, 18))])
def test_folds(name, fold, first):
    p = PROTOCOLS[name]
    assert p.fold_classes(fold)[:5] == first
    assert sorted(c for f in range(4) for c in p.fold_classes(f)) == list(range(4*p.fold_size))       # every class is tested once
    assert p.split(p.targets[0].dataset, fold) == f'val{fold}' + '-blocks'*(name == 'coco-20i-blocks')                      # COCO's own are interleaved
    with pytest.raises(InputError, match='expected 0 to 3'): p.split(p.targets[0].dataset, 4)
    with pytest.raises(InputError, match='expected a fold'): p.split(p.targets[0].dataset)
    with pytest.raises(InputError, match='expected no fold'): PROTOCOLS['patnet'].split('isic', 1)
    with pytest.raises(InputError, match='no folds'): PROTOCOLS['patnet'].fold_classes(0)

def test_novel_classes_in_training():
    assert PROTOCOLS['pascal-5i'].novel == PROTOCOLS['coco-20i'].novel == 'kept' and PROTOCOLS['pascal-5i-dropped'].novel == PROTOCOLS['coco-20i-dropped'].novel == 'dropped'

def test_deepglobe_sizes_are_known_to_the_doctor():
    doctor = pytest.importorskip('cdfss.data.doctor')
    assert {p.target('deepglobe').images for p in PROTOCOLS.values()} - {None} <= set(doctor.PUBLISHED['deepglobe'])

# ---- audit
def episodes(target, epoch, share, n=90, seed=0, method='ssp', shot=1, own=0):
    rng = np.random.default_rng([seed, len(target)])
    size, hard = rng.integers(500, 3000, n), rng.normal(0, .15, n) + np.random.default_rng([seed, epoch, own]).normal(0, .05, n)
    tp = (size*np.clip(share + hard, 0, 1)).astype(int)
    return pd.DataFrame(dict(target=target, shot=shot, method=method, epoch=epoch, index=range(n), query=[f'q{i}' for i in range(n)], supports='s',
                             cls=np.arange(n) % 3, tp=tp, fp=size//5, fn=size - tp, tn=9216 - size - size//5))

COURSE = dict(voc=(.9, .5, .7, .6), isic=(.9, .40, .45, .55), chest=(.9, .60, .50, .45))

@pytest.fixture(scope='module')
def followed(): return pd.concat(episodes(t, e, s) for t, shares in COURSE.items() for e, s in enumerate(shares))

def test_audit_picks_the_epochs(followed):
    t = audit(followed).set_index(['target', 'checkpoint'])
    want = {'isic': (3, 2, 3), 'chest': (3, 2, 1)}
    assert {n: tuple(int(t.loc[(n, c), 'epoch']) for c in CHECKPOINTS) for n in want} == want
    assert t.loc['mean', 'epoch'].isna().tolist() == [False, False, True]                # 3 for both, 2 for both, 3 and 1
    assert list(t.index.get_level_values(0).unique()) == ['isic', 'chest', 'mean']

def test_audit_values_and_intervals(followed):
    t = audit(followed).set_index(['target', 'checkpoint'])
    f = lambda target, epoch: followed[(followed.target == target) & (followed.epoch == epoch)]
    row = t.loc[('chest', 'best on source validation')]
    assert (row.value, row.low, row.high) == pytest.approx(bootstrap(f('chest', 2)))
    assert (row.gap, row.gap_low, row.gap_high) == pytest.approx(paired_bootstrap(f('chest', 2), f('chest', 1)))
    mean = t.loc[('mean', 'last')]
    assert (mean.value, mean.low, mean.high) == pytest.approx(bootstrap_mean([f('isic', 3), f('chest', 3)]))
    assert (mean.gap, mean.gap_low, mean.gap_high) == pytest.approx(paired_bootstrap_mean([(f('isic', 3), f('isic', 3)), (f('chest', 3), f('chest', 1))]))
    assert (t.gap >= 0).all() and (t.xs(CHECKPOINTS[2], level=1).gap == 0).all()

def test_audit_start_is_no_candidate_unless_asked(followed):
    assert set(audit(followed, first=0).query('checkpoint != "last"')['epoch']) == {0} and 0 not in set(audit(followed)['epoch'])
    assert set(audit(followed[followed.epoch == 0])['epoch']) == {0}                      # nothing else was followed

def test_audit_reads_a_history(followed):
    values = followed.groupby(['epoch', 'target']).apply(METRICS['class_miou']).unstack()
    history = pd.DataFrame({'epoch': range(4), 'loss': .5, 'source_miou': values['voc'], 'miou/ssp/isic': values['isic'], 'miou/ssp/chest': values['chest']})
    a, b = audit(history), audit(followed)
    pd.testing.assert_frame_equal(a[['method', 'target', 'checkpoint', 'epoch', 'value', 'gap']], b[['method', 'target', 'checkpoint', 'epoch', 'value', 'gap']])
    assert a['low'].isna().all()
    with pytest.raises(InputError, match='give the run.s followed.parquet'): audit(history, metric='fb_iou')

def test_audit_of_two_methods_of_one_run(followed):
    both = pd.concat([followed, followed.assign(method='ssp+lcm')])
    t = audit(both)
    assert list(t['method'].unique()) == ['ssp', 'ssp+lcm'] and len(t) == 18
    history = pd.DataFrame({'epoch': [1, 2], 'source_miou': [2., 1.], 'miou/ssp/isic': [3., 4.], 'miou/ssp+lcm/isic': [5., 4.]})
    t = audit(history).set_index(['method', 'checkpoint'])
    assert t.loc[('ssp', CHECKPOINTS[1]), 'epoch'] == 1 and t.loc[('ssp', CHECKPOINTS[1]), 'gap'] == 1 and t.loc[('ssp+lcm', 'last'), 'gap'] == 1

def test_audit_with_gaps(followed):
    "Without source validation that row is absent; epochs that were not followed are no candidates."
    assert list(audit(followed[followed.target != 'voc'])['checkpoint'].unique()) == [CHECKPOINTS[0], CHECKPOINTS[2]]
    t = audit(followed[~((followed.target == 'chest') & (followed.epoch == 1))]).set_index(['target', 'checkpoint'])
    assert t.loc[('chest', CHECKPOINTS[2]), 'epoch'] == 2
    with pytest.raises(InputError, match='follows no target'): audit(followed[followed.target == 'voc'])
    with pytest.raises(InputError, match='neither followed.parquet'): audit(pd.DataFrame(dict(epoch=[1])))

# ---- compare
@pytest.fixture
def run_of(tmp_path):
    def make(name, shares, manifests='m', method='ssp', shots=(1,), seed=0):
        run = Run(tmp_path/name)
        write_json(run.path/'params.json', dict(method=method))
        write_json(run.path/'metrics.json', dict(manifests={f'{t}-{k}shot': f'{manifests}{t}{k}' for t in shares for k in shots}))
        run.write_frame('episodes.parquet', pd.concat(episodes(t, 5, s, seed=seed, method=method, shot=k, own=ord(name)) for t, s in shares.items() for k in shots))
        return run
    return make

def test_compare(run_of):
    a, b = run_of('a', dict(isic=.5, chest=.5), shots=(1, 5)), run_of('b', dict(isic=.6, chest=.5), shots=(1, 5), method='ssp+lem')
    t = compare(a, b.path)
    assert list(zip(t['shot'], t['target'])) == [(1, 'chest'), (1, 'isic'), (1, 'mean'), (5, 'chest'), (5, 'isic'), (5, 'mean')]
    row = t.set_index(['shot', 'target']).loc[(1, 'isic')]
    fa, fb = (r.episodes.query('target == "isic" and shot == 1') for r in (a, b))
    assert (row.difference, row.low, row.high) == pytest.approx(paired_bootstrap(fa, fb)) and row.reading == 'real: B is better'
    assert compare(b, a).set_index(['shot', 'target']).loc[(1, 'isic'), 'reading'] == 'real: B is worse'
    assert t.set_index(['shot', 'target']).loc[(1, 'chest'), 'reading'] == 'not clear' and 'ssp+lem (b) minus A = ssp (a)' in t.attrs['caption']
    mean = t.set_index(['shot', 'target']).loc[(1, 'mean')]
    assert mean.b - mean.a == pytest.approx(mean.difference) and mean.low < mean.difference < mean.high

def test_equal_runs_do_not_differ(run_of):
    a = run_of('a', dict(isic=.5))
    assert compare(a, a)[['difference', 'low', 'high']].to_numpy().tolist() == [[0, 0, 0]] and set(compare(a, a).reading) == {'not clear'}

def test_compare_refuses(run_of):
    a = run_of('a', dict(isic=.5))
    with pytest.raises(InputError, match=r'a and b were scored on different manifests for isic-1shot \(misic1 and xisic1\)'): compare(a, run_of('b', dict(isic=.5), 'x'))
    with pytest.raises(InputError, match='nothing to compare'): compare(a, run_of('c', dict(chest=.5)))
    with pytest.raises(InputError, match="scored ssp, not 'lem'"): compare(a, a, methods=('ssp', 'lem'))
    with pytest.raises(InputError, match='no metrics.json'): compare(a, a.path/'none')
    with pytest.raises(InputError, match='depends on how episodes are batched'): compare(a, a, metric='ifa_compat')

def test_a_target_of_one_run_only_is_left_out(run_of):
    assert list(compare(run_of('a', dict(isic=.5, chest=.4)), run_of('b', dict(isic=.6)))['target']) == ['isic']

def test_reading(): assert [reading(1, 2), reading(-2, -1), reading(-1, 1), reading(0, 1)] == ['real: better', 'real: worse', 'not clear', 'not clear']
