import json
import subprocess
import sys
from collections import Counter
import pytest
from cdfss.basics import InputError
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import RULES, Manifest, draw, fit_epoch, usable_classes
from fakes import polyps, touch, voc

# ---- the reference lists ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def reference(parity): return json.loads((parity/'episodes.json').read_text())

@pytest.fixture(scope='module')
def tree(reference, tmp_path_factory):
    "The made-up files of the reference lists, all of them empty."
    root = tmp_path_factory.mktemp('reference')
    touch(root, *reference['files'])
    for name, lines in reference['split_files'].items(): touch(root, name, text='\n'.join(lines) + '\n')
    ids = {line.split('__')[0] for line in reference['split_files']['data/splits/pascal/val/fold0.txt']}
    touch(root, *(f'VOC2012/{f}' for i in ids for f in (f'JPEGImages/{i}.jpg', f'SegmentationClassAug/{i}.png')))
    return root

READ_AS = {'deepglobe': ('patnet', 'deepglobe', 'test'), 'isic': ('patnet', 'isic', 'test'), 'lung': ('patnet', 'chest', 'test'),
           'fss_test': ('patnet', 'fss', 'test'), 'fss_val': ('patnet', 'fss', 'val'), 'fss_test_hsnet': ('hsnet', 'fss', 'test'),
           'pascal_fold0_val_hsnet': ('hsnet', 'voc', 'val0')}
CASES = [f'{n}/{s}' for s in ('shot1/seed0', 'shot1/seed1', 'shot5/seed0') for n in READ_AS]

def test_all_reference_lists_are_checked(reference): assert sorted(CASES) == sorted(reference['episode_lists']) and len(CASES) == 21

@pytest.mark.parametrize('case', CASES)
def test_reference_episodes(reference, tree, case):
    name, shot, seed = case.split('/')
    rule, dataset, split = READ_AS[name]
    d, want = open_dataset(dataset, tree, split), reference['episode_lists'][case]
    m = draw(rule, d, shot=int(shot[4:]), seed=int(seed[4:]))
    assert len(m) == want['dataset_length']
    def as_reference(p):
        it = d.items[p]
        if dataset == 'chest': return it.mask.relative_to(tree).as_posix()
        return it.image.stem if dataset == 'voc' else it.id
    got = [[as_reference(q), [as_reference(p) for p in s], c + d.offset] for q, s, c in m.episodes]
    assert got[:len(want['episodes'])] == want['episodes']

# ---- rules ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('rule', list(RULES))
@pytest.mark.parametrize('dataset', ['deepglobe', 'fss', 'chest', 'isic'])
def test_every_rule(tree, rule, dataset):
    d = open_dataset(dataset, tree)
    m = draw(rule, d, shot=3, seed=5)
    for (q, s, c), ids in zip(m.episodes, m.ids):
        assert q not in s and len(s) == 3 and {d.items[p].cls for p in (q, *s)} == {c} and ids == tuple(d.items[p].id for p in (q, *s))
        if rule in ('balanced', 'exhaustive'): assert len(set(s)) == 3
    assert m.hash == draw(rule, d, shot=3, seed=5).hash
    assert len({m.hash, draw(rule, d, shot=3, seed=6).hash, draw(rule, d, shot=2, seed=5).hash}) == 3
    assert draw(rule, d, 3, 5, episodes=7, offset=4).episodes == m.episodes[4:11] and draw(rule, d, 3, 5, episodes=9).episodes == m.episodes[:9]

def test_exhaustive_asks_every_pair_once(tmp_path):
    d = open_dataset('voc', voc(tmp_path, {f'{i:02d}': [1, 2] if i % 2 else [1] for i in range(11)}, val=[]))
    m = draw('exhaustive', d, shot=2)
    assert sorted(q for q, *_ in m.episodes) == list(range(len(d))) == list(range(16))

def test_distinct_supports_are_uniform(tmp_path):
    d = open_dataset('kvasir', polyps(tmp_path, 5))
    m = draw('exhaustive', d, shot=2, episodes=5000)
    counts = Counter((q, s) for q, s, _ in m.episodes)
    assert len(counts) == 5*4*3 and max(counts.values()) < 140 and min(counts.values()) > 40       # 83 expected, sd 9

def test_balanced_is_balanced(tree):
    d = open_dataset('deepglobe', tree)
    m = draw('balanced', d, episodes=120)
    assert Counter(c for *_, c in m.episodes) == {c: 20 for c in range(6)}
    for c in range(6): assert len({q for q, _, k in m.episodes if k == c}) == 20          # no query twice before all were asked

def test_draw_refuses(tree):
    d = open_dataset('deepglobe', tree)
    for kw, match in ((dict(rule='patnt'), "did you mean 'patnet'"), (dict(rule='patnet', episodes=0), 'episodes=0'), (dict(rule='patnet', shot=0), 'shot=0'),
                      (dict(rule='patnet', seed=-1), 'seed=-1'), (dict(rule='patnet', offset=-1), 'offset=-1')):
        with pytest.raises(InputError, match=match): draw(dataset=d, **kw)

# ---- small classes ----------------------------------------------------------------------------------------------------------
def test_small_class(tmp_path):
    voc(tmp_path, {'a': [1], 'b': [1], 'c': [1, 2], 'd': [3]}, val=[])
    d = open_dataset('voc', tmp_path)
    with pytest.raises(InputError, match=r"'voc': class 'bicycle' has 1 images, 1-shot episodes need 2 \(and 1 more"): draw('hsnet', d)
    with pytest.raises(InputError, match='bicycle'): fit_epoch(d, 0, 0)
    lax = open_dataset('voc', tmp_path, on_error='skip')
    assert {c for *_, c in draw('hsnet', lax, shot=2).episodes} == {0} and len(fit_epoch(lax, 0, 0)) == 3
    assert len(lax.problems) == 4 and all('images' in p for p in lax.problems)             # two classes, at one and at two shots
    with pytest.raises(InputError, match='no class has the 4 images'): usable_classes(lax, 3)

def test_repeated_lines_are_one_image(tmp_path):
    voc(tmp_path, {'a': [1], 'b': [1]})
    for f in range(4): touch(tmp_path, f'splits/pascal/trn/fold{f}.txt', text='a__01\nb__01\nb__01\n' if f == 0 else '')
    d = open_dataset('voc', tmp_path)
    with pytest.raises(InputError, match='has 2 images'): draw('hsnet', d, shot=2)
    for q, s, _ in draw('hsnet', d, episodes=60).episodes + fit_epoch(d, 0, 0) + draw('exhaustive', d).episodes + draw('balanced', d, episodes=20).episodes:
        assert d.items[q].id not in {d.items[p].id for p in s}

# ---- saved and read ---------------------------------------------------------------------------------------------------------
def test_save_and_load(tree, tmp_path):
    d = open_dataset('isic', tree)
    m = draw('patnet', d, shot=5, seed=3)
    m.save(tmp_path/'m.json')
    assert Manifest.load(tmp_path/'m.json', d) == m
    shuffled = d.without([])
    shuffled.items = shuffled.items[::-1]                                                # other positions, same ids
    again = Manifest.load(tmp_path/'m.json', shuffled)
    assert again.ids == m.ids and again.hash == m.hash and again.episodes != m.episodes
    with pytest.raises(InputError, match='not in data set'): Manifest.load(tmp_path/'m.json', d.without([m.ids[0][0]]))
    with pytest.raises(InputError, match="of data set 'isic', not of 'deepglobe'"): Manifest.load(tmp_path/'m.json', open_dataset('deepglobe', tree))

def test_load_refuses(tree, tmp_path):
    d = open_dataset('deepglobe', tree)
    good = draw('patnet', d, episodes=4).to_json()
    def load(**change):
        (tmp_path/'m.json').write_text(json.dumps({**good, **change}))
        return Manifest.load(tmp_path/'m.json', d)
    assert len(load()) == 4
    for change, match in ((dict(seed=9), 'hash does not fit'), (dict(ids=good['ids'][:3], cls=good['cls'][:3]), 'hash does not fit'),
                          (dict(ids=[[good['ids'][0][0]]*2] + good['ids'][1:]), 'its own supports'), (dict(cls=good['cls'][:2]), 'no readable manifest'),
                          (dict(ids=7), 'no readable manifest')):
        with pytest.raises(InputError, match=match): load(**change)
    (tmp_path/'m.json').write_text('{')
    with pytest.raises(InputError, match='no readable manifest'): Manifest.load(tmp_path/'m.json', d)
    with pytest.raises(InputError, match='no readable manifest'): Manifest.load(tmp_path/'none.json', d)

def test_hash_does_not_depend_on_the_process(tree, tmp_path):
    d = open_dataset('fss', tree)
    code = f"from cdfss.data.layouts import open_dataset; from cdfss.data.manifests import *; d = open_dataset('fss', {str(tree)!r}); " \
           "print(draw('balanced', d, 2, 4).hash, hash(tuple(fit_epoch(d, 1, 2))))"
    out = {subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env={'PYTHONHASHSEED': s, 'PATH': ''}).stdout for s in '12'}
    assert out == {f"{draw('balanced', d, 2, 4).hash} {hash(tuple(fit_epoch(d, 1, 2)))}\n"}

# ---- training ---------------------------------------------------------------------------------------------------------------
def test_fit_epoch(tree):
    d = open_dataset('fss', tree)
    e = fit_epoch(d, 3, 1, shot=5)
    assert e == fit_epoch(d, 3, 1, shot=5) and sorted(q for q, *_ in e) == list(range(len(d)))
    assert len({str(fit_epoch(d, s, k, 5)) for s in (3, 4) for k in (1, 2)}) == 4
    assert fit_epoch(d, 3, 1, 5, episodes=7) == e[:7] and fit_epoch(d, 3, 1, 5, episodes=10**6) == e
    assert all(q not in s and len(s) == 5 and {d.items[p].cls for p in (q, *s)} == {c} for q, s, c in e)
    assert any(len(set(s)) < 5 for _, s, _ in e)                                             # as published, a support may repeat
    with pytest.raises(InputError, match='episodes=0'): fit_epoch(d, 0, 0, episodes=0)

def test_fit_order_does_not_depend_on_shots(tree):
    d = open_dataset('fss', tree)
    assert [q for q, *_ in fit_epoch(d, 0, 0, 1)] == [q for q, *_ in fit_epoch(d, 0, 0, 5)]

def test_fit_supports_are_uniform(tmp_path):
    d = open_dataset('kvasir', polyps(tmp_path, 4))
    counts = Counter((q, s[0]) for k in range(1000) for q, s, _ in fit_epoch(d, 0, k))
    assert len(counts) == 12 and all(250 < n < 420 for n in counts.values())              # 333 expected, sd 15

@pytest.mark.real
def test_real_voc_epoch(real_data):
    d = open_dataset('voc', real_data, on_error='skip')
    e = fit_epoch(d, 0, 0)
    assert 1500 < len(e) < len(d) and any("class 'train' has 1 images" in p for p in d.problems)
