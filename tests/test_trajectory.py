"Peaks and falls from made-up records whose truth is known: no fall is invented, a real one is found."
import numpy as np
import pandas as pd, pytest
from cdfss.basics import InputError, write_json
from cdfss.diagnostics.trajectory import fair_falls, followed, label, peaks, remedies, study, tidy_episodes, trajectories
from cdfss.engine.metrics import class_miou
from cdfss.engine.runs import Run

def a_run(root, seed, levels, method='ssp', freeze='none', noise=.05, episodes=60, target='isic', manifest='a', study=0):
    "A run that followed one target; `levels` are the true IoU per epoch. Noise is per seed and epoch (the training) and per episode."
    rng = np.random.default_rng([study, seed, *method.encode(), *freeze.encode()])
    rows = []
    for e, level in enumerate(np.asarray(levels) + rng.normal(0, noise, len(levels))):
        tp = (1000*(level + rng.normal(0, .1, episodes)).clip(.05, .95)).astype(int)
        rows.append(pd.DataFrame(dict(target=target, shot=1, method=method, epoch=e, index=np.arange(episodes), cls=np.arange(episodes) % 3, tp=tp, fp=0, fn=1000 - tp, tn=8000)))
    run = Run(root/f'{method}-{freeze}-{seed}-{study}')
    write_json(run.path/'params.json', dict(method=method, seed=seed, freeze=freeze))
    write_json(run.path/'metrics.json', dict(protocol='patnet', seed=seed, manifests={f'{target}-1shot': manifest*64}))
    run.write_frame('followed.parquet', pd.concat(rows))
    return run

def test_fair_fall_is_unbiased_where_nothing_happens(tmp_path):
    "Sixteen studies of flat curves with training noise: the usual fall is far from 0, the fair one is not."
    usual, fair = [], []
    for k in range(16):
        runs = [a_run(tmp_path, s, [.5]*8, study=k) for s in range(3)]
        frame = followed(runs)
        usual.append(peaks(pd.concat([tidy_episodes(f, draws=2).assign(seed=s) for s, f in frame.groupby('seed')])).fall[0])
        fair.append(fair_falls(frame, splits=6)[0].fair_fall[0])
    error = np.std(fair)/np.sqrt(16)
    assert np.mean(usual) > 3 and abs(np.mean(fair)) < 3*error and error < 1

def test_a_real_fall_is_found(tmp_path):
    runs = [a_run(tmp_path, s, [.4, .6, .6, .5, .4, .3], noise=.01) for s in range(3)]
    row = fair_falls(followed(runs))[0].iloc[0]
    assert 25 < row.fair_fall < 33 and row.fair_low > 15 and row.fair_reading == 'falls' and row.fair_epoch in (1, 2)
    rising = fair_falls(followed([a_run(tmp_path, s, [.3, .4, .5, .6], noise=.01, study=1) for s in range(3)]))[0].iloc[0]
    assert rising.fair_fall == 0 and rising.fair_reading == 'no clear fall' and rising.fair_epoch == 3

def test_one_seed_has_an_interval_over_episodes(tmp_path):
    run = a_run(tmp_path, 0, [.4, .6, .4, .3], noise=0)
    row = fair_falls(followed([run]), draws=200)[0].iloc[0]
    assert row.fair_low < row.fair_fall < row.fair_high and row.fair_low > 20
    assert np.isnan(peaks(trajectories([run])).low[0]) and peaks(trajectories([run])).peak_epoch[0] == 1

def test_fair_fall_of_one_split_against_a_loop(tmp_path):
    runs = [a_run(tmp_path, s, [.4, .6, .55, .4]) for s in range(2)]
    frame = followed(runs)
    found, each = fair_falls(frame, splits=3, seed=5)
    from cdfss.diagnostics.domains import halves
    h = halves(np.arange(60) % 3, 3, 5)
    falls = {0: [], 1: []}
    for d in range(3):
        for one, other in ((h[d] == 1, h[d] == 0), (h[d] == 0, h[d] == 1)):
            at = lambda s, e, half: class_miou(frame[(frame.seed == s) & (frame.epoch == e) & half[frame['index']]].drop(columns=['seed']))
            for s in (0, 1):
                best = max(range(4), key=lambda e: at(1 - s, e, one))
                falls[s].append(at(s, best, other) - at(s, 3, other))
    assert np.allclose(each.sort_values('seed').fall, [np.mean(falls[0]), np.mean(falls[1])])
    assert np.isclose(found.fair_fall[0], np.mean([*falls[0], *falls[1]]))

def test_labels_order_and_provenance(tmp_path):
    runs = [a_run(tmp_path, s, [.4, v, v - d], method=m, freeze=f, noise=.01) for s in range(2) for m, f, v, d in (('ssp+lem', 'none', .6, .02), ('ssp', 'stem', .6, .0), ('ssp', 'none', .6, .2))]
    assert label(runs[1], 'ssp') == 'ssp, stem frozen' and label(runs[0], 'ssp+lem') == 'ssp+lem'
    frames = study(runs, splits=10)
    assert list(frames['falls'].method) == ['ssp', 'ssp+lem', 'ssp, stem frozen']
    assert (frames['falls'].manifest == 'a'*8).all() and (frames['trajectory'].protocol == 'patnet').all()
    r = frames['remedies'].set_index('method')
    assert set(r.index) == {'ssp+lem', 'ssp, stem frozen'} and (r.base == 'ssp').all() and (r.fall < -10).all() and (r['last'] > 10).all()

def test_remedies_need_a_base_and_two_seeds(tmp_path):
    lone = [a_run(tmp_path, s, [.4, .6, .5], method='ssp+lem') for s in range(2)]
    assert len(remedies(trajectories(lone), fair_falls(followed(lone))[1])) == 0
    single = [a_run(tmp_path, 0, [.4, .6, .5], method=m, study=1) for m in ('ssp', 'ssp+lem')]
    assert len(study(single, splits=4, draws=50)['remedies']) == 0

def test_refusals(tmp_path):
    a = a_run(tmp_path, 0, [.4, .5])
    with pytest.raises(InputError, match='runs is empty'): followed([])
    with pytest.raises(InputError, match='different manifests'): study([a, a_run(tmp_path, 1, [.4, .5], manifest='b')])
    with pytest.raises(InputError, match='not followed at the same epochs'): fair_falls(followed([a, a_run(tmp_path, 2, [.4, .5, .6])]))
    (a.path/'followed.parquet').unlink()
    with pytest.raises(InputError, match='no followed.parquet'): followed([a])

def test_tidy_episodes(tmp_path):
    f = followed([a_run(tmp_path, 0, [.4, .5])]).drop(columns=['seed', 'run'])
    tidy = tidy_episodes(f)
    assert len(tidy) == 2 and np.isclose(tidy.miou[0], class_miou(f[f.epoch == 0])) and (tidy.low < tidy.miou).all() and len(tidy_episodes(f[:0])) == 0
