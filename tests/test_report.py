"Tables from made-up run folders, the epoch lines, and pictures: same bytes twice, edge cases, one-line refusals."
import re, warnings
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from cdfss.basics import InputError, write_json
from cdfss.engine.metrics import class_miou, seed_interval
from cdfss.methods.seams import ALIASES, MODULES, discover
from cdfss.report import plots
from cdfss.diagnostics.trajectory import tidy_episodes
from cdfss.report.tables import progress_header, progress_line, results, styled, summarise, to_text, wide

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def a_run(root, recipe, seed=0, value=40., protocol='patnet', manifest='a', methods=None, targets=('isic', 'fss'), shots=(1,), name=None, dirty=False):
    "A finished run as the engine writes it."
    path = root/(name or f'{recipe}-{seed}')
    rows = [dict(method=m, target=t, shot=k, class_miou=value + i, low=value + i - 2, high=value + i + 1, fb_iou=60., mean_episode_iou=50., ifa_compat=60., episodes=600)
            for m in methods or (recipe,) for i, t in enumerate(targets) for k in shots]
    write_json(path/'params.json', dict(method=recipe, seed=seed))
    write_json(path/'env.json', dict(commit='0123456789', dirty=dirty, device='CPU, 2 threads'))
    write_json(path/'metrics.json', dict(protocol=protocol, seed=seed, epoch=6, results=rows, manifests={f'{t}-{k}shot': f'{manifest}{i}{k}'*8 for i, t in enumerate(targets) for k in shots}))
    return path

# ---- tables
def test_results_carries_where_numbers_come_from(tmp_path):
    r = results([a_run(tmp_path, 'ssp', seed=3, dirty=True)]).iloc[0]
    assert (r.run, r.own, r.method, r.target, r.shot, r.class_miou) == ('ssp-3', True, 'ssp', 'isic', 1, 40)
    assert (r.protocol, r.manifest, r.seed, r.epoch, r.commit, r.device, r.episodes) == ('patnet', 'a01a01a0', 3, 6, '01234567+', 'CPU, 2 threads', 600)

def test_results_names_a_run_that_is_not_finished(tmp_path):
    path = a_run(tmp_path, 'ssp')
    (path/'metrics.json').unlink()
    with pytest.raises(InputError, match='ssp-0: no metrics.json'): results([path])
    with pytest.raises(InputError, match='no results'): results([])

def test_wide_is_the_fields_table(tmp_path):
    table = wide(results([a_run(tmp_path, 'ssp', shots=(1, 5)), a_run(tmp_path, 'lem', value=50, targets=('isic',))]))
    assert table.columns.tolist() == ['fss 1-shot', 'isic 1-shot', 'mean 1-shot', 'fss 5-shot', 'isic 5-shot', 'mean 5-shot']
    assert table.loc['ssp'].tolist()[:3] == ['41.0 [39.0, 42.0]', '40.0 [38.0, 41.0]', '40.5']
    assert table.loc['lem'].tolist() == ['-', '50.0 [48.0, 51.0]', '-', '-', '-', '-']        # no mean over targets it lacks
    for part in ('95 % bootstrap', 'Protocol patnet', 'isic 1-shot a01a01a0', 'seed 0', 'epoch 6', 'commit 01234567', 'CPU, 2 threads'): assert part in table.attrs['caption']

def test_several_seeds_become_mean_and_t_interval(tmp_path):
    found = results([a_run(tmp_path, 'ssp', seed=s, value=v) for s, v in enumerate((40., 41., 45.))])
    row = summarise(found).query("target == 'isic'").iloc[0]
    assert (row.value, row.low, row.high) == seed_interval([40, 41, 45]) and row.seeds == 3
    mean = summarise(found).query("target == 'mean'").iloc[0]
    assert (mean.value, mean.low, mean.high) == pytest.approx(seed_interval([40.5, 41.5, 45.5]))
    assert '95 % t-interval over seeds' in wide(found).attrs['caption'] and 'seed 0, 1, 2' in wide(found).attrs['caption']

def test_other_metrics_have_no_invented_interval(tmp_path):
    table = wide(results([a_run(tmp_path, 'ssp')]), 'fb_iou')
    assert table.loc['ssp', 'isic 1-shot'] == '60.0' and 'FB-IoU (%), no interval' in table.attrs['caption']
    with pytest.raises(InputError, match='fb_iou'): wide(results([a_run(tmp_path, 'ssp')]), 'fbiou')

def test_mixing_is_refused(tmp_path):
    a = a_run(tmp_path, 'ssp')
    with pytest.raises(InputError, match=r'different protocols.*patnet in ssp-0; hsnet in lem-0'): wide(results([a, a_run(tmp_path, 'lem', protocol='hsnet')]))
    with pytest.raises(InputError, match=r'different manifests for isic 1-shot.*b01b01b0 in lem-1'): wide(results([a, a_run(tmp_path, 'lem', seed=1, manifest='b')]))
    mixed = pd.concat([results([a]), results([a]).assign(protocol='ifa')])
    with pytest.raises(InputError) as e: summarise(mixed)
    assert '\n' not in str(e.value)
    with pytest.raises(InputError, match='empty'): summarise(mixed[:0])

def test_a_method_scored_in_several_runs(tmp_path):
    own, beside = a_run(tmp_path, 'ssp', value=40), a_run(tmp_path, 'lcm', value=42, methods=('lcm', 'ssp'))
    assert wide(results([beside, own])).loc['ssp', 'isic 1-shot'].startswith('40.0')           # its own run counts
    assert wide(results([beside])).loc['ssp', 'isic 1-shot'].startswith('42.0')
    again = a_run(tmp_path, 'ssp', value=40, name='copy')
    assert wide(results([own, again])).loc['ssp', 'isic 1-shot'].startswith('40.0')            # equal rows are one
    with pytest.raises(InputError, match=r"'ssp' has several runs with seed 0 \(ssp-0, other\)"):
        wide(results([own, a_run(tmp_path, 'ssp', value=44, name='other')]))

def test_text_and_html(tmp_path):
    table = wide(results([a_run(tmp_path, 'ssp'), a_run(tmp_path, 'ssp+lem+lcm', value=44)]))
    lines = to_text(table).split('\n')
    assert len({len(l) for l in lines[:4]}) == 1 and set(lines[1]) == {'-'} and all(len(l) <= 120 for l in lines)
    assert ' '.join(lines[4:]) == table.attrs['caption']
    html = styled(table).to_html()
    assert html == styled(table).to_html() and table.attrs['caption'] in html
    bold = re.findall(r'#(T_cdfss_row\d+_col\d+)', html.split('font-weight: bold')[0].rsplit('}', 1)[-1])
    assert bold == [f'T_cdfss_row1_col{k}' for k in range(3)]

# ---- the line per epoch
def test_progress_lines_are_aligned():
    columns = ['miou/ssp+lcm/isic', 'miou/ssp+lcm/deepglobe']
    rows = [dict(epoch=0, seconds=3., source_miou=5.), dict(epoch=1, loss=float('nan'), seconds=9.97, **dict.fromkeys(columns, 100.)),
            dict(epoch=200, loss=.123456, seconds=3725., **{columns[0]: float('nan')})]
    lines = [progress_header(columns), *(progress_line(r, 200, columns) for r in rows)]
    assert len({len(l) for l in lines}) == 1 and 'nan' not in ''.join(lines)
    assert lines[0].split() == ['epoch', 'loss', 'source', 'isic', 'deepglobe', 'time', 'left']
    assert [l.split() for l in lines[1:]] == [['0/200', '-', '5.0', '-', '-', '3.0s', '-'], ['1/200', '-', '-', '100.0', '100.0', '10s', '33m04s'],
                                              ['200/200', '0.1235', '-', '-', '-', '1h02m', '0.0s']]
    assert progress_header(['miou/ssp/isic', 'miou/lem/isic']).split()[3:5] == ['ssp/isic', 'lem/isic']
    assert len(progress_header()) == len(progress_line(rows[0], 200))

def test_tidy_episodes():
    f = pd.DataFrame([dict(epoch=e, target=t, shot=1, method='ssp', cls=i % 2, tp=10 + e + i, fp=5, fn=5, tn=80) for e in (0, 1) for t in ('isic', 'fss') for i in range(8)])
    tidy = tidy_episodes(f)
    assert tidy[['epoch', 'target']].values.tolist() == [[0, 'isic'], [0, 'fss'], [1, 'isic'], [1, 'fss']]
    assert tidy.miou[0] == class_miou(f[:8]) and (tidy.low < tidy.miou).all() and len(tidy_episodes(f[:0])) == 0
    assert plots.trajectory(tidy).axes

# ---- pictures
def scene(seed=0, grey=False):
    rng = np.random.default_rng(seed)
    mask = np.hypot(*(np.mgrid[:24, :30] - np.array([12, 15])[:, None, None])) < 6 + seed
    image = rng.integers(0, 255, (24, 30) if grey else (24, 30, 3), dtype=np.uint8)
    return image, mask, image, mask

def tidy_rows(targets=('voc', 'isic'), methods=('ssp', 'ssp+lem'), epochs=4, **more):
    return pd.DataFrame([dict(epoch=e, target=t, method=m, miou=30. + e + len(m)) for t in targets for m in methods for e in range(epochs)]).assign(**more)

def summary(shots=(1,), methods=('ssp', 'lem'), targets=('isic', 'fss', 'mean')):
    return pd.DataFrame([dict(method=m, target=t, shot=s, value=40. + s, low=np.nan if t == 'mean' else 38., high=np.nan if t == 'mean' else 44.)
                         for s in shots for m in methods for t in targets])

def stages(): return pd.DataFrame([dict(stage=s, target=t, cka=.5) for t in ('voc', 'isic') for s in ('stem', 'layer1')])

FIGURES = dict(episodes=lambda: plots.episodes([scene(), scene(2, grey=True)], ['a', 'b']), predictions=lambda: plots.predictions([(*scene(), scene(3)[1])], ['best']),
               trajectory=lambda: plots.trajectory(tidy_rows(low=29., high=40.)), bars=lambda: plots.bars_with_intervals(summary((1, 5))),
               by_stage=lambda: plots.by_stage(stages(), 'cka'))

@pytest.mark.parametrize('name', FIGURES)
def test_same_bytes_twice(name, tmp_path):
    frame = pd.DataFrame({'a': [1, 2.5], 'b': ['x', 'y']})
    one, two = (plots.save(FIGURES[name](), tmp_path/part/'fig', frame) for part in ('one', 'two'))
    assert [p.name for p in one] == ['fig.png', 'fig.svg', 'fig.csv']
    for a, b in zip(one, two): assert a.read_bytes() == b.read_bytes() and a.stat().st_size > 10
    assert b'Software' not in one[0].read_bytes() and b'<dc:date>' not in one[1].read_bytes() and one[2].read_bytes() == b'a,b\n1.0,x\n2.5,y\n'

def test_style_does_not_leak():
    before = dict(plt.rcParams)
    plots.trajectory(tidy_rows()); plots.bars_with_intervals(summary())
    assert dict(plt.rcParams) == before

def test_trajectory_edge_cases():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        one = plots.trajectory(tidy_rows(('isic',), ('ssp',), epochs=1, low=28., high=33.))
        assert len(one.axes) == 1 and len(one.axes[0].collections) == 1                       # the interval of a single epoch is a line
        plots.trajectory(tidy_rows(('isic',), ('ssp',), epochs=1))
        gaps = tidy_rows()
        gaps.loc[gaps.index % 3 == 0, 'miou'] = np.nan
        plots.trajectory(gaps)
        assert len(plots.trajectory(tidy_rows([f't{i}' for i in range(7)])).axes) == 7
    order = [a.get_title(loc='left') for a in plots.trajectory(tidy_rows(('chest', 'mine', 'voc', 'fss'))).axes]
    assert order == ['voc (source)', 'fss', 'chest', 'mine']
    fig, ax = plt.subplots()
    assert plots.trajectory(tidy_rows(('isic',)), ax) is fig and ax.get_ylabel() == 'class mIoU (%)'

def test_trajectory_marks_the_peak_and_draws_seeds():
    rows = pd.concat([tidy_rows(('isic',), ('ssp',)).assign(seed=s, miou=lambda f: 30 + s - (f.epoch - 2)**2) for s in range(3)])
    fig = plots.trajectory(rows)
    lines = fig.axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), [27, 30, 31, 30])                        # the mean over seeds
    assert (lines[1].get_xdata()[0], lines[1].get_ydata()[0]) == (2, 31) and fig.axes[0].texts[0].get_text() == '31.0'
    band = fig.axes[0].collections[0].get_paths()[0].get_extents()
    np.testing.assert_allclose((band.ymin, band.ymax), (seed_interval([26, 27, 28])[1], seed_interval([30, 31, 32])[2]))

@pytest.mark.parametrize('call, words', [
    (lambda: plots.trajectory(tidy_rows()[:0]), 'tidy holds no miou'), (lambda: plots.trajectory(tidy_rows().drop(columns='target')), 'lacks the columns target'),
    (lambda: plots.trajectory(pd.concat([tidy_rows()]*2)), 'several rows for ssp on voc'), (lambda: plots.trajectory(pd.concat([tidy_rows(shot=1), tidy_rows(shot=5)])), 'mixes shots'),
    (lambda: plots.trajectory(tidy_rows(), plt.subplots()[1]), 'one panel'), (lambda: plots.bars_with_intervals(summary()[:0]), 'summary holds no value'),
    (lambda: plots.bars_with_intervals(summary((1, 5)), plt.subplots()[1]), 'one panel'), (lambda: plots.episodes([]), 'empty'), (lambda: plots.predictions([]), 'empty'),
    (lambda: plots.by_stage(stages()[:0], 'cka'), 'no cka'), (lambda: plots.by_stage(stages(), 'sharpness'), 'lacks the columns sharpness'),
    (lambda: plots.episodes([(scene()[0]/255., *scene()[1:])]), r'image is float64 of shape \(24, 30, 3\)')])
def test_refusals_are_one_line(call, words):
    with pytest.raises(InputError, match=words) as e: call()
    assert '\n' not in str(e.value)

def test_masks_that_are_empty_or_full():
    image, mask, *_ = scene()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fig = plots.predictions([(image, ~mask | mask, image, mask & False, mask & False), (image, mask & False, image, mask, mask & False)])
    assert [a.get_title(loc='center') for a in fig.axes[2::3]] == ['IoU 100 %', 'IoU 0 %']    # nothing to find, nothing found

def test_many_predictions_are_set_three_to_a_row():
    fig = plots.predictions([(*scene(), scene(i)[1]) for i in range(5)], list('abcde'))
    assert len(fig.axes) == 15 and [a.get_ylabel() for a in fig.axes[::3]] == list('abcde') and fig.get_figwidth() <= plots.WIDTH
    tops = [round(a.get_position().y1, 3) for a in fig.axes[::3]]
    assert tops[0] == tops[1] == tops[2] > tops[3] == tops[4]

def test_bars_draw_the_numbers():
    fig = plots.bars_with_intervals(summary())
    heights = sorted(p.get_height() for p in fig.axes[0].patches)
    assert heights == [41.]*6 and {t.get_text() for t in fig.axes[0].texts} == {'41.0'}
    drawn = {tuple(s[:, 1]) for c in fig.axes[0].collections for s in c.get_segments() if len(s)}
    assert {s for s in drawn if not np.isnan(s).any()} == {(38., 44.)}

def test_colours_are_fixed(monkeypatch):
    discover()
    for name, module in MODULES.items():
        paper = module.__module__.rsplit('.', 1)[-1]
        assert paper in plots.FAMILY_COLOURS, f'{name}: give the paper {paper} a colour in plots.FAMILY_COLOURS'
    for alias in ALIASES: assert plots.family(alias) != 'other'
    monkeypatch.setitem(MODULES, 'apm', type('APM', (), {'__module__': 'cdfss.methods.lfm', 'phases': (), 'seams': ()}))
    assert (plots.family('ssp'), plots.family('ssp+lem+lcm'), plots.family('ssp+apm'), plots.family('ssp+lem+apm'), plots.family('ours')) == ('base', 'loec', 'lfm', 'several', 'other')
    assert plots.family('ssp+lem, stem frozen') == 'loec'
    looks = plots.method_styles(['ssp', 'lem', 'ssp+lem+lcm'])
    assert looks['lem']['color'] == looks['ssp+lem+lcm']['color'] and looks['lem']['linestyle'] != looks['ssp+lem+lcm']['linestyle']
