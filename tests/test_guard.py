import shutil
import pytest
from cdfss.basics import InputError
from cdfss.data.guard import Ledger, check_leakage, duplicates, mark, own_supports, overlap
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import RULES, draw
from fakes import blob, picture, polyps, voc

@pytest.fixture
def root(tmp_path): return polyps(tmp_path, 6)

def plant(root, image, name='copy'):
    "A copy of an image and its mask under another name."
    shutil.copy(root/f'Kvasir-SEG/images/{image}.jpg', root/f'Kvasir-SEG/images/{name}.jpg')
    shutil.copy(root/f'Kvasir-SEG/masks/{image}.png', root/f'Kvasir-SEG/masks/{name}.png')

@pytest.mark.parametrize('rule', list(RULES))
def test_published_rules_are_clean(root, rule):
    m = draw(rule, open_dataset('kvasir', root), 2, 0, 40)
    queries, supports = {e[0] for e in m.ids}, {i for e in m.ids for i in e[1:]}
    assert queries & supports                                          # one episode's query is another's support: no leak
    assert check_leakage([m]) == dict(on=True, leaks=[])

def test_planted_duplicate_is_caught(root):
    plant(root, 4)
    m = draw('exhaustive', open_dataset('kvasir', root), shot=5)         # 7 images, 5 shots: the copy is among the supports of most
    with pytest.raises(InputError, match=r'images/4.jpg and \S*images/copy.jpg: one image, asked and shown in episode 4 .*guard=False'): check_leakage([m])
    record = check_leakage([m], on=False)
    assert record['on'] is False and record['leaks'] == own_supports(m) and mark(record) == f"guard off, {len(record['leaks'])} leaks"

def test_a_changed_byte_is_another_image(root):
    plant(root, 4)
    with open(root/'Kvasir-SEG/images/copy.jpg', 'ab') as f: f.write(b' ')
    d = open_dataset('kvasir', root)
    assert not duplicates(d) and check_leakage([draw('exhaustive', d, shot=5)])['on']

def test_duplicates_name_both_files(root):
    plant(root, 2)
    (line,) = duplicates(open_dataset('kvasir', root))
    assert 'images/2.jpg and ' in line and "images/copy.jpg: one image under 2 names in class 'polyp'" in line

def test_one_chip_in_two_class_folders_is_no_duplicate(tmp_path):
    for c in (1, 2):
        picture(tmp_path/f'Deepglobe/{c}/test/origin/1_sat_00.png', 0)
        blob(tmp_path/f'Deepglobe/{c}/test/groundtruth/1_mask_00.png', c)
        picture(tmp_path/f'Deepglobe/{c}/test/origin/2_sat_00.png', c)
        blob(tmp_path/f'Deepglobe/{c}/test/groundtruth/2_mask_00.png', c)
    d = open_dataset('deepglobe', tmp_path)
    assert not duplicates(d) and check_leakage([draw('patnet', d, episodes=8)])['leaks'] == []

def test_an_image_of_several_classes_is_no_duplicate(tmp_path):
    d = open_dataset('voc', voc(tmp_path, {f'{i}': [1, 2] for i in range(4)}))
    assert not duplicates(d) and check_leakage([draw('hsnet', d, episodes=12)])['leaks'] == []

def test_source_and_target_share_an_image(root):
    voc(root, {f's{i}': [1] for i in range(4)})
    for i in range(4): picture(root/f'VOC2012/JPEGImages/s{i}.jpg', 100 + i)
    source = open_dataset('voc', root)
    target = open_dataset('kvasir', root)
    m = draw('exhaustive', target)
    assert check_leakage([m], source=source)['leaks'] == []
    shutil.copy(root/'Kvasir-SEG/images/3.jpg', root/'VOC2012/JPEGImages/s2.jpg')
    source = open_dataset('voc', root)
    with pytest.raises(InputError, match=r"images/3.jpg and \S*JPEGImages/s2.jpg: one image, in the episodes of 'kvasir' 1-shot and in the source data 'voc'"):
        check_leakage([m], source=source)
    assert check_leakage([draw('patnet', target.without([3]), episodes=20)], source=source)['leaks'] == []       # never asked nor shown

def test_tuning_data(root):
    target = open_dataset('kvasir', root)
    m = draw('exhaustive', target, episodes=3)                             # queries 0, 1, 2
    assert check_leakage([m], tuning={'kvasir': target.without([0, 1, 2])})['on']
    with pytest.raises(InputError, match=r'images/1.jpg: one image, a query .* in the tuning data'): check_leakage([m], tuning={'kvasir': target.without([0, 2])})
    assert check_leakage([m], tuning={'isic': target})['leaks'] == []       # tuning data of another target
    plant(root, 1)
    pool = open_dataset('kvasir', root).without([0, 1, 2])                 # the query's copy is enough
    with pytest.raises(InputError, match='1.jpg and .*copy.jpg'): check_leakage([m], tuning={'kvasir': pool})

def test_overlap_counts_each_image_once(root):
    d = open_dataset('kvasir', root)
    assert len(overlap(draw('patnet', d, episodes=200), d, 'the pool', queries_only=True)) == 6

def test_marks():
    assert mark(dict(on=True, leaks=[])) == '' and mark(dict(on=False, leaks=[])) == 'guard off, no leaks'

def test_ledger():
    ledger = Ledger()
    with pytest.raises(InputError, match='adapting on a: outside any episode'): ledger.use(['a'])
    with ledger.allow(['a', 'b']) as inner:
        assert inner is ledger
        ledger.use(['a'])
        ledger.use(iter(['b', 'a']))
        with pytest.raises(InputError, match='adapting on q: not among the 2 supports'): ledger.use(['a', 'q', 'q'])
        with pytest.raises(InputError, match='finish the episode'):
            with ledger.allow(['c']): pass
        ledger.use(['a'])                                               # the refused inner episode did not end the outer one
    assert ledger.used == 3 and ledger.record == dict(on=True, leaks=[])
    with pytest.raises(InputError, match='outside'): ledger.use(['a'])
    with pytest.raises(ZeroDivisionError):
        with ledger.allow(['a']): 1/0
    with pytest.raises(InputError, match='outside'): ledger.use(['a'])       # an error ends the episode too

def test_ledger_off_records():
    ledger = Ledger(on=False)
    with ledger.allow(['a']):
        ledger.use(['q'])
        ledger.use(['q'])
    assert ledger.record == dict(on=False, leaks=['adapting on q: not among the 1 supports of the episode']) and mark(ledger.record) == 'guard off, 1 leak'
