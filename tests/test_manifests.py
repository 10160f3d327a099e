import hashlib
import json
import subprocess
import sys
from collections import Counter
import pytest
from cdfss.basics import InputError
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import EPISODES, RULES, Manifest, draw, draw_nested, fit_epoch, load_manifests, usable_classes
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

ORDERS = """
import os, pathlib, random, sys
seed, root, out = sys.argv[1:]
def mixed(names):                                       # the file system lists in any order it likes
    names = list(names)
    random.Random(seed).shuffle(names)
    return names
listdir, iterdir, glob = os.listdir, pathlib.Path.iterdir, pathlib.Path.glob
os.listdir = lambda *a: mixed(listdir(*a))
pathlib.Path.iterdir = lambda self: iter(mixed(iterdir(self)))
pathlib.Path.glob = lambda self, *a, **k: iter(mixed(glob(self, *a, **k)))
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import RULES, draw
for rule in RULES:
    for name in ('deepglobe', 'isic', 'chest', 'fss'): draw(rule, open_dataset(name, root), 2, 3, 40).save(f'{out}/{rule}-{name}.json')
"""

def test_bytes_do_not_depend_on_process_or_listing_order(tree, tmp_path):
    for seed in '12':
        subprocess.run([sys.executable, '-c', ORDERS, seed, str(tree), str(tmp_path/seed)], check=True, env={'PYTHONHASHSEED': seed, 'PATH': ''})
    made = sorted(p.name for p in (tmp_path/'1').iterdir())
    assert len(made) == 4*len(RULES)
    for name in made: assert (tmp_path/'1'/name).read_bytes() == (tmp_path/'2'/name).read_bytes(), name
    draw('hsl', open_dataset('isic', tree), 2, 3, 40).save(tmp_path/'here.json')
    assert (tmp_path/'here.json').read_bytes() == (tmp_path/'1'/'hsl-isic.json').read_bytes()

def test_content_is_part_of_the_manifest(tmp_path):
    d = open_dataset('kvasir', polyps(tmp_path, 4))
    m = draw('exhaustive', d, shot=2)
    m.save(tmp_path/'m.json')
    assert m.to_json()['counts'] == dict(episodes=4, images=4, classes={'0': 4}) and set(m.files) == {it.id for it in d.items}
    assert m.files['Kvasir-SEG/images/1.jpg'][1] == hashlib.sha256((tmp_path/'Kvasir-SEG/masks/1.png').read_bytes()).hexdigest()
    for kind, file in (('image', tmp_path/'Kvasir-SEG/images/2.jpg'), ('mask', tmp_path/'Kvasir-SEG/masks/3.png')):
        was = file.read_bytes()
        file.write_bytes(was + b' ')
        changed = open_dataset('kvasir', tmp_path)
        with pytest.raises(InputError, match=f'{file.name}: not the {kind} that .*m.json was drawn on'): Manifest.load(tmp_path/'m.json', changed)
        again = draw('exhaustive', changed, shot=2)
        assert again.ids == m.ids and again.hash != m.hash
        file.write_bytes(was)
    assert Manifest.load(tmp_path/'m.json', open_dataset('kvasir', tmp_path)).hash == m.hash

def test_a_file_that_is_gone_is_named(tmp_path):
    m = draw('exhaustive', open_dataset('kvasir', polyps(tmp_path, 3)))
    (tmp_path/'Kvasir-SEG/images/1.jpg').unlink()
    with pytest.raises(InputError, match='1.jpg: cannot be read'): m.hash

# ---- published counts and nesting -------------------------------------------------------------------------------------------
@pytest.mark.parametrize('rule, count', [('patnet', 600), ('ifa', 600), ('hsl', 1200), ('abcdfss', None)])
def test_published_counts(tree, rule, count):
    for name in ('deepglobe', 'isic', 'chest'):
        d = open_dataset(name, tree)
        assert len(draw(rule, d)) == (count or len(d)) and (rule == 'abcdfss' or EPISODES[rule] == count)
    d = open_dataset('fss', tree)
    assert len(draw(rule, d)) == len(d)

def test_hsl_and_ifa_draw_as_patnet(tree):
    for name in ('isic', 'fss'):
        d = open_dataset(name, tree)
        lists = {rule: draw(rule, d, 5, 7, 60) for rule in ('patnet', 'hsl', 'ifa')}
        assert lists['hsl'].ids == lists['ifa'].ids == lists['patnet'].ids and len({m.hash for m in lists.values()}) == 3

def test_abcdfss_asks_every_image_once(tree):
    d = open_dataset('deepglobe', tree)
    assert [q for q, *_ in draw('abcdfss', d, seed=2).episodes] == list(range(len(d)))

@pytest.mark.parametrize('rule', list(RULES))
def test_nested(tree, rule):
    d = open_dataset('isic', tree)
    m = draw_nested(rule, d, (5, 1, 3), seed=4)
    assert m[5].to_json() == draw(rule, d, 5, 4).to_json() and list(m) == [1, 3, 5]
    for (q1, s1, c1), (q3, s3, c3), (q5, s5, c5) in zip(*(m[k].episodes for k in (1, 3, 5)), strict=True):
        assert q1 == q3 == q5 and c1 == c3 == c5 and s1 == s5[:1] and s3 == s5[:3]
    assert m[1].rule == f'{rule}, first 1 of 5' and m[3].first(1).ids == m[1].ids
    with pytest.raises(InputError, match='expected 1 to 5'): m[5].first(6)
    with pytest.raises(InputError, match='shots is empty'): draw_nested(rule, d, ())

def test_load_manifests(tree, tmp_path):
    opened = []
    def opener(name, split):
        opened.append(name)
        return open_dataset(name, tree, split)
    want = {(n, k): draw('patnet', open_dataset(n, tree), k, episodes=5) for n in ('isic', 'chest') for k in (1, 5)}
    for (n, k), m in want.items(): m.save(tmp_path/f'{n}-{k}shot.json')
    assert load_manifests(tmp_path, opener) == want and sorted(opened) == ['chest', 'isic']
    assert load_manifests(f"{tmp_path/'isic-1shot.json'}, {tmp_path/'chest-5shot.json'}", opener) == {k: want[k] for k in (('isic', 1), ('chest', 5))}
    with pytest.raises(InputError, match='isic 1-shot is in .*already'): load_manifests(f"{tmp_path/'isic-1shot.json'},{tmp_path/'isic-1shot.json'}", opener)
    (tmp_path/'none').mkdir()
    with pytest.raises(InputError, match='no .json file there'): load_manifests(tmp_path/'none', opener)
    (tmp_path/'x.json').write_text('[1]')
    with pytest.raises(InputError, match='no readable manifest'): load_manifests(tmp_path/'x.json', opener)

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
