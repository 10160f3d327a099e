"The leaderboard: the committed file is sound, families are not ranked together, and runs are appended once."
import math, shutil
import numpy as np, pandas as pd, pytest
from cdfss.basics import InputError, write_json
from cdfss.engine.metrics import bootstrap, bootstrap_mean
from cdfss.engine.runs import Run
from cdfss.report.leaderboard import COLUMNS, FAMILIES, append, check_means, leaderboard_path, read_board, run_rows, table

@pytest.fixture(scope='module')
def board(): return read_board()

def figure(board, method, backbone, family, target, shot):
    key = dict(method=method, backbone=backbone, family=family, target=target, shot=shot)
    (value,) = board['value'][np.logical_and.reduce([board[k] == v for k, v in key.items()]).astype(bool)]
    return value

# ---- the file
def test_every_row_has_a_source_and_a_family(board):
    published = board[board['run'] == '']
    assert len(published) > 350 and (published['source'] != '').all() and set(published['family']) == set(FAMILIES) and list(board.columns) == list(COLUMNS)
    assert set(board.loc[board.family == 'B', 'metric']) == {'fb_iou', 'class_miou', 'ifa_compat', 'mixed'} and set(board.loc[board.family == 'A', 'metric']) == {'class_miou'}

@pytest.mark.parametrize('args, value', [(('PATNet', 'R50', 'A', 'isic', 1), 41.16), (('HSL', 'ViT-B', 'A', 'mean', 5), 72.32), (('HSL', 'R50', 'A', 'deepglobe', 5), 53.80),
                                         (('LoEC', 'R50', 'A', 'isic', 1), 38.21), (('IFA', 'R50', 'B', 'isic', 1), 66.3), (('IFA', 'R50', 'B', 'fss', 5), 82.4),
                                         (('MPA without source', 'R50', 'B', 'suim', 5), 61.1), (('SDRC', 'ViT-B', 'B', 'isic', 1), 69.7), (('SDRC', 'ViT-B', 'A', 'isic', 1), 46.57),
                                         (('DCDNet', 'R50', 'B', 'deepglobe', 5), 62.5), (('ABCDFSS', 'R50', 'A', 'deepglobe', 5), 49.0), (('HERA', 'DINOv3 ViT-L/16', 'A', 'chest', 5), 87.9)])
def test_figures(board, args, value): assert figure(board, *args) == value

def test_protocol_card_and_board_agree(board):
    "The rows of protocol.md 9 (SDRC Table 2) were typed from another place."
    card = {'PANet': (69.15, 71.68, 36.55, 45.43, 25.29, 33.99, 57.75, 69.31, 47.19, 55.10), 'HSNet': (77.53, 80.99, 29.65, 35.08, 31.20, 35.10, 51.88, 54.36, 47.57, 51.38),
            'PATNet': (78.59, 81.23, 37.89, 42.97, 41.16, 53.58, 66.61, 70.20, 56.06, 61.99), 'LFM (APM-M)': (79.29, 81.83, 40.86, 44.92, 41.71, 51.16, 78.25, 82.81, 60.03, 65.18),
            'DR-Adapter': (79.05, 80.40, 41.29, 50.12, 40.77, 48.87, 82.35, 82.31, 60.86, 65.42), 'HSL': (78.22, 80.36, 46.13, 53.80, 48.01, 55.56, 84.57, 85.34, 64.23, 68.77)}
    for m, want in card.items():
        assert tuple(figure(board, m, 'R50', 'A', t, s) for t in ('fss', 'deepglobe', 'isic', 'chest', 'mean') for s in (1, 5)) == want

def test_printed_means(board):
    off = check_means(board)
    assert set(zip(off['method'], off['family'], off['shot'])) == {('SCCAN', 'pascal-5i-dropped', 1), ('SSP', 'B', 1)} and off['note'].str.contains('average').all()
    wrong = board.assign(value=np.where((board.method == 'HSL') & (board.backbone == 'R50') & (board.target == 'isic') & (board.shot == 1), 48.10, board['value']))
    assert 'HSL' in set(check_means(wrong)['method'])

# ---- ranking
def test_refuses_to_rank_across_families(board):
    with pytest.raises(InputError, match='rows of 2 protocols cannot be ranked together: A: foreground class mIoU .*; B: the IFA evaluation: pooled .* mix=True'):
        table(board[board.family.isin(['A', 'B'])])
    with pytest.raises(InputError, match='cannot be ranked together'): table(board)

def test_ranks_within_a_family(board):
    t = table(board[board.family == 'A'], shot=5)
    assert t['method'].iloc[0] == 'HERA' and t['rank'].iloc[0] == '1' and 'family' not in t and list(t.columns[-2:]) == ['mean', 'selection']
    scores = t['mean'].str.rstrip('*').replace('-', np.nan).astype(float).dropna()
    assert scores.is_monotonic_decreasing and t.loc[t.method == 'PATNet', 'isic'].iloc[0] == '53.6*'
    assert table(board[board.family == 'A'], sort='deepglobe')['method'].iloc[0] == 'SDRC'             # Swin-B, 46.63

def test_mixed_tables_keep_ranks_apart(board):
    t = table(board[board.family.isin(['A', 'B'])], mix=True)
    assert t['family'].tolist() == sorted(t['family']) and t[t.family == 'B']['rank'].iloc[0] == '1' and 'within a family only' in t.attrs['caption']
    assert t[t.family == 'B']['method'].iloc[0] == 'MPA'

def test_table_refuses(board):
    with pytest.raises(InputError, match='no row with shot=3'): table(board, shot=3)
    with pytest.raises(InputError, match="unknown target 'isi': did you mean 'isic'"): table(board[board.family == 'A'], sort='isi')

# ---- bad files
def test_bad_files(board, tmp_path):
    p = tmp_path/'l.csv'
    def read(change):
        change(board.copy()).to_csv(p, index=False)
        return read_board(p)
    assert len(read(lambda b: b)) == len(board)
    for change, match in ((lambda b: b.drop(columns='source'), 'no column source'), (lambda b: b.assign(value=b['value'].where(b.index != 3, 147.)), r'l.csv, line 5: PANet chest 1-shot has a value outside'),
                          (lambda b: b.assign(source=b['source'].where(b.index != 0, '')), 'line 2: .* no source'), (lambda b: pd.concat([b, b[:1]]), 'entered already'),
                          (lambda b: b.assign(family=b['family'].where(b.index != 1, 'C')), 'unknown family')):
        with pytest.raises(InputError, match=match): read(change)
    with pytest.raises(InputError, match='no leaderboard there'): read_board(tmp_path/'none.csv')

# ---- own runs
@pytest.fixture
def run(tmp_path):
    r, rng, n = Run(tmp_path/'ssp+lem-0123456789'), np.random.default_rng(0), 120
    frame = pd.DataFrame(dict(target=np.repeat(['isic', 'chest'], n//2), shot=1, method='ssp+lem', cls=np.arange(n) % 3, tp=rng.integers(400, 900, n), fp=rng.integers(0, 300, n),
                              fn=rng.integers(0, 400, n), tn=8000))
    r.write_frame('episodes.parquet', pd.concat([frame, frame.assign(method='ssp', tp=0)]))
    write_json(r.path/'params.json', dict(method='ssp+lem', backbone='miniature', data_root=None, size=96))
    write_json(r.path/'env.json', dict(commit='0123456789abcdef', dirty=True))
    write_json(r.path/'metrics.json', dict(protocol='patnet', seed=3, epoch=6, results=[]))
    return r

@pytest.fixture
def file(tmp_path):
    p = tmp_path/'leaderboard.csv'
    p.write_bytes(leaderboard_path().read_bytes())
    return p

def test_append(run, file, board):
    b = append(run, file)
    own = b[b['run'] == run.path.name].set_index('target')
    assert len(b) == len(board) + 3 and b[:len(board)].equals(board) and set(own['family']) == {'own: patnet on the miniature, counted at 96 px'} and set(own['method']) == {'ssp+lem'}
    f = run.episodes.query('method == "ssp+lem"')
    parts = [f[f.target == t] for t in ('isic', 'chest')]
    assert tuple(own.loc['isic', ['value', 'low', 'high']]) == pytest.approx(bootstrap(parts[0]), abs=.006)
    assert tuple(own.loc['mean', ['value', 'low', 'high']]) == pytest.approx(bootstrap_mean(parts), abs=.006)
    assert own['source'].iloc[0] == 'run ssp+lem-0123456789, commit 01234567+' and not own['second_hand'].any()
    first = file.read_bytes()
    append(run, file)
    assert file.read_bytes() == first                                      # again: nothing changes

def test_runs_gather_beside_their_folders(run, board, tmp_path):
    append(run)
    other = Run(tmp_path/'ssp+lem-9876543210')
    shutil.copytree(run.path, other.path)
    b = append(other)
    assert len(b) == len(board) + 6 and list(b['run'].unique()) == ['', run.path.name, other.path.name]
    pd.testing.assert_frame_equal(read_board(tmp_path/'leaderboard.csv'), b)
    assert read_board().equals(board), 'the committed board is as it was'

def test_own_runs_are_not_ranked_with_published_ones(run, file):
    b = append(run, file)
    with pytest.raises(InputError, match='own: patnet on the miniature, counted at 96 px: runs of this project'): table(b[b.family.isin(['A', 'own: patnet on the miniature, counted at 96 px'])])
    as_a = append(run, file, family='A')
    assert 'ssp+lem' in set(table(as_a[as_a.family == 'A'])['method']) and len(as_a) == len(b)
    with pytest.raises(InputError, match='unknown family'): append(run, file, family='D')
    with pytest.raises(InputError, match="'coco-20i-dropped': its figures are counted at native size, those of .* at working size"): append(run, file, family='coco-20i-dropped')
    write_json(run.path/'metrics.json', run.metrics | dict(counted='native'))
    with pytest.raises(InputError, match="'A': its figures are counted at working size"): append(run, file, family='A')
    assert set(run_rows(run)['family']) == {'own: patnet on the miniature, counted at native'} and len(run_rows(run, 'coco-20i-dropped')) == 3

def test_the_guard_is_marked(run, file):
    write_json(run.path/'metrics.json', run.metrics | dict(guard=dict(on=False, leaks=['x'])))
    b = append(run, file)
    assert table(b[b['run'] != ''])['selection'].iloc[0] == 'last epoch (6); guard off, 1 leak; seed 3, 120 episodes'

def test_headline_metric_of_the_protocol(run):
    write_json(run.path/'metrics.json', run.metrics | dict(protocol='ifa', results=[dict(method='ssp+lem', target='isic', shot=1, ifa_compat=66.3)]))
    rows = run_rows(run)
    (row,) = rows[rows['metric'] == 'ifa_compat'].to_dict('records')
    assert row['value'] == 66.3 and math.isnan(row['low']) and row['family'] == 'own: ifa on the miniature, counted at 96 px'
