import shutil
from collections import Counter
import numpy as np
import pytest
from PIL import Image
from cdfss.basics import InputError
from cdfss.data.layouts import DATASETS, VOC, open_dataset
from fakes import polyps, touch, voc

def fails(match, *args, **kw):
    with pytest.raises(InputError, match=match) as e: open_dataset(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)

# ---- names and order -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('base', ['Deepglobe/04_train_cat', 'Deepglobe', 'DeepGlobe', 'deepglobe/04_Train_Cat'])
@pytest.mark.parametrize('mask', ['{i}_mask_{ij}.png', '{i}_sat_{ij}.png'])
def test_deepglobe_places_and_mask_names(tmp_path, base, mask):
    for c in range(1, 7):
        for i, ij in ((9, '10'), (10, '05')):
            touch(tmp_path, f'{base}/{c}/test/origin/{i}_sat_{ij}.jpg', f'{base}/{c}/test/groundtruth/' + mask.format(i=i, ij=ij))
    d = open_dataset('deepglobe', tmp_path)
    assert [it.image.name for it in d.items[:2]] == ['10_sat_05.jpg', '9_sat_10.jpg'] and d.items[1].mask.name == mask.format(i=9, ij='10')
    assert [len(v) for v in d.by_class.values()] == [2]*6 and not d.index_masks and d.notes == []
    assert d.items[0].id == d.items[0].image.relative_to(tmp_path).as_posix()

def test_deepglobe_faults(tmp_path):
    assert 'Deepglobe/04_train_cat' in fails('no Deepglobe', 'deepglobe', tmp_path)
    touch(tmp_path, 'DeepGlobe/12_sat.jpg')
    fails('cut them into chips', 'deepglobe', tmp_path)
    touch(tmp_path, 'DeepGlobe/1/test/origin/12_sat_00.jpg')
    fails('no groundtruth under', 'deepglobe', tmp_path)
    touch(tmp_path, 'DeepGlobe/1/test/groundtruth/other.png')
    assert '12_mask_00.png' in (m := fails('missing mask', 'deepglobe', tmp_path)) and '12_sat_00.png' in m

def test_fss_is_sorted_as_strings_and_offset(tmp_path):
    for c in ('zebra', 'Model_T', 'abacus'): touch(tmp_path, *(f'FSS-1000/{c}/{n}.{s}' for n in range(1, 11) for s in ('jpg', 'png')))
    touch(tmp_path, 'data/splits/fss/val.txt', text='zebra\r\nModel_T\r\n\r\n')
    d = open_dataset('fss', tmp_path, 'val')
    assert d.classes == ('Model_T', 'zebra') and d.offset == 520 and len(d) == 20
    assert [it.image.stem for it in d.items[:4]] == ['1', '10', '2', '3'] and 'published' in d.notes[0]
    assert open_dataset('fss', tmp_path, 'all').classes == ('Model_T', 'abacus', 'zebra')
    assert 'splits/fss/test.txt' in fails("split='all'", 'fss', tmp_path)                      # the default split is test
    touch(tmp_path, 'splits/fss/test.txt', text='abacus\nyurt\n')
    fails("missing folder of class 'yurt'", 'fss', tmp_path)
    skipped = open_dataset('fss', tmp_path, 'test', on_error='skip')
    assert skipped.classes == ('abacus', 'yurt') and list(skipped.by_class) == [0] and len(skipped.problems) == 1
    (tmp_path/'FSS-1000/abacus/7.png').unlink()
    assert len(open_dataset('fss', tmp_path, 'test', on_error='skip')) == 9

def isic(root, folders, n=4):
    ids = [f'ISIC_{i:07d}' for i in range(n*3)]
    for k, i in enumerate(ids):
        touch(root, f'ISIC/ISIC2018_Task1_Training_GroundTruth/{i}_segmentation.png',
              f'ISIC/ISIC2018_Task1-2_Training_Input/{f"{k % 3 + 1}/" if folders else ""}{i}.jpg')
    touch(root, 'ISIC/ISIC2018_Task1-2_Training_Input/ATTRIBUTION.txt', 'ISIC/ISIC2018_Task1-2_Training_Input/ISIC_0000000_superpixels.png')
    return ids

def test_isic_folders_and_csv(tmp_path):
    ids = isic(tmp_path, True)
    touch(tmp_path, 'ISIC/ISIC2018_Task1-2_Training_Input/1/ISIC_0000000_superpixels.png', 'ISIC/ISIC2018_Task1-2_Training_Input/3/ATTRIBUTION.txt')
    d = open_dataset('isic', tmp_path)
    assert d.classes == ('1', '2', '3') and [it.image.stem for it in d.items] == ids[0::3] + ids[1::3] + ids[2::3]
    names = ['seborrheic_keratosis', 'nevus', 'melanoma']                                      # DR-Adapter's numbering
    touch(tmp_path, 'ISIC/class_id.csv', text='ID,Class\n' + '\n'.join(f'{i},{names[k % 3]}' for k, i in enumerate(ids)))
    named = open_dataset('isic', tmp_path)
    assert named.classes == tuple(names) and named.items == d.items and '1 = seborrheic_keratosis' in named.notes[0]

def test_isic_flat_follows_hsl_and_names_lost_ids(tmp_path):
    ids = isic(tmp_path, False)
    fails('neither class folders', 'isic', tmp_path)
    names = ['seborrheic_keratosis', 'nevus', 'melanoma']
    table = '\ufeffID,Class\r\n' + '\r\n'.join(f'{i},{names[k % 3]}' for k, i in enumerate(ids))
    touch(tmp_path, 'ISIC/class_id.csv', text=table)
    d = open_dataset('isic', tmp_path)
    assert d.classes == ('nevus', 'melanoma', 'seborrheic_keratosis') and d.by_class == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9, 10, 11]}
    assert [it.image.stem for it in d.items[:4]] == ids[1::3] and d.items[0].id == f'ISIC/ISIC2018_Task1-2_Training_Input/{ids[1]}.jpg'
    touch(tmp_path, 'ISIC/class_id.csv', text=table + '\r\nISIC_7777777,nevus')
    fails('ISIC_7777777.jpg: missing image', 'isic', tmp_path)
    touch(tmp_path, 'ISIC/class_id.csv', text=table.replace(ids[0] + ',', 'ISIC_8888888,'))
    assert '2 such faults' in fails(f'{ids[0]}.jpg: has no row', 'isic', tmp_path)
    assert len(open_dataset('isic', tmp_path, on_error='skip')) == 11
    touch(tmp_path, 'ISIC/class_id.csv', text='image,label\nx,y\n')
    fails('expected the columns ID,Class', 'isic', tmp_path)

def test_chest_lists_masks(tmp_path):
    touch(tmp_path, *(f'LungSegmentation/CXR_png/{n}.png' for n in ('CHNCXR_0001_0', 'CHNCXR_0002_0', 'MCUCXR_0001_1', 'MCUCXR_0002_1')))
    touch(tmp_path, *(f'LungSegmentation/masks/{n}.png' for n in ('CHNCXR_0002_0_mask', 'MCUCXR_0001_1', 'MCUCXR_0002_1_mask')))
    d = open_dataset('chest', tmp_path)
    assert [(it.image.stem, it.mask.stem) for it in d.items] == [('CHNCXR_0002_0', 'CHNCXR_0002_0_mask'), ('MCUCXR_0001_1', 'MCUCXR_0001_1'),
                                                                 ('MCUCXR_0002_1', 'MCUCXR_0002_1_mask')]
    assert d.notes == ['images without a mask, not used: 1']
    touch(tmp_path, 'LungSegmentation/masks/CHNCXR_0009_0_mask.png')
    fails('CHNCXR_0009_0.png: missing image', 'chest', tmp_path)
    assert open_dataset('chest', tmp_path, on_error='skip').items == d.items

# ---- VOC -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('base', ['VOC2012', 'PASCAL/VOCdevkit/VOC2012', 'VOCdevkit/VOC2012'])
def test_voc_places(tmp_path, base):
    voc(tmp_path/'made', {'2012_000001': [3]})
    (tmp_path/'r'/base).parent.mkdir(parents=True)
    shutil.move(tmp_path/'made/VOC2012', tmp_path/'r'/base)
    d = open_dataset('voc', tmp_path/'r')
    assert d.items[0].id == f'{base}/JPEGImages/2012_000001.jpg' and d.items[0].cls == 2 and d.index_masks and d.classes == VOC and d.split == 'trn'

def test_voc_from_masks(tmp_path):
    voc(tmp_path, {'b': [1, 20], 'a': [9], 'c': [12, 6]}, val=['c'], train=['b', '/JPEGImages/a.jpg /SegmentationClassAug/a.png'])
    assert [(it.image.stem, it.cls) for it in open_dataset('voc', tmp_path).items] == [('b', 0), ('b', 19), ('a', 8)]
    assert [(it.image.stem, it.cls) for it in open_dataset('voc', tmp_path, 'val').items] == [('c', 5), ('c', 11)]
    assert [it.cls for it in open_dataset('voc', tmp_path, 'trn0').items] == [19, 8] and [it.cls for it in open_dataset('voc', tmp_path, 'val2').items] == [11]
    touch(tmp_path, 'VOC2012/classes.txt', text='\n'.join(f'shape {i}' for i in range(22)))
    assert len(open_dataset('voc', tmp_path).classes) == 22

def test_voc_holdout_is_every_tenth(tmp_path):
    ids = [f'{i:03d}' for i in range(25)]
    voc(tmp_path, {i: [4] for i in ids}, train=ids[::-1])
    train, val = open_dataset('voc', tmp_path), open_dataset('voc', tmp_path, 'val')
    assert [it.image.stem for it in val.items] == ['019', '009'] and len(train) == 23
    assert not {it.id for it in train.items} & {it.id for it in val.items} and 'held out' in train.notes[0] and 'held out' in val.notes[0]

def test_voc_lists(tmp_path):
    voc(tmp_path, {'x': [1, 6], 'y': [11], 'z': [16, 20]})
    lines = ['x__01', 'x__06', 'y__11', 'z__16\nz__20']
    for f, text in enumerate(lines): touch(tmp_path, f'VOC2012/data/splits/pascal/trn/fold{f}.txt', text=text + '\n')
    d = open_dataset('voc', tmp_path)
    assert [(it.image.stem, it.cls) for it in d.items] == [('x', 0), ('x', 5), ('y', 10), ('z', 15), ('z', 19)]
    assert [it.cls for it in open_dataset('voc', tmp_path, 'trn3').items] == [0, 5, 10]
    assert len(open_dataset('voc', tmp_path, min_area=100)) == 5 and fails('no image with a mask', 'voc', tmp_path, min_area=10**6)
    fails('min_area=0', 'voc', tmp_path, min_area=0); fails('min_area=2', 'isic', tmp_path, min_area=2)
    touch(tmp_path, 'VOC2012/data/splits/pascal/trn/fold1.txt', text='x__21\n')
    fails("line 'x__21': expected", 'voc', tmp_path)
    (tmp_path/'VOC2012/data/splits/pascal/trn/fold1.txt').unlink()
    fails('fold1.txt: missing list', 'voc', tmp_path)

def test_voc_min_area_counts_native_pixels(tmp_path):
    voc(tmp_path, {'x': [1], 'y': [1]})
    m = np.zeros((30, 40), np.uint8); m[0, :7] = 1
    Image.fromarray(m).save(tmp_path/'VOC2012/SegmentationClassAug/y.png')
    assert [len(open_dataset('voc', tmp_path, min_area=a)) for a in (1, 7, 8)] == [2, 2, 1]

def test_voc_faults(tmp_path):
    voc(tmp_path, {i: [1] for i in 'abcdef'})
    masks = tmp_path/'VOC2012/SegmentationClassAug'
    (masks/'a.png').unlink()
    (masks/'b.png').write_bytes((masks/'b.png').read_bytes()[:60])
    Image.new('RGB', (40, 30), 'red').save(masks/'c.png')
    (tmp_path/'VOC2012/JPEGImages/d.jpg').unlink()
    (masks/'e.png').write_text('no picture')
    fails("on_error='skip'", 'voc', tmp_path)
    d = open_dataset('voc', tmp_path, on_error='skip')
    assert [it.image.stem for it in d.items] == ['f'] and len(d.problems) == 5
    for what in ('a.jpg: missing mask', 'b.png: cannot be read', 'c.png: mode RGB', 'd.jpg: missing image', 'e.png: cannot be read'):
        assert sum(what in p for p in d.problems) == 1, (what, d.problems)
    touch(tmp_path, *(f'splits/pascal/trn/fold{k}.txt' for k in range(4)), text='b__01\nf__01\n')
    assert [it.image.stem for it in open_dataset('voc', tmp_path, on_error='skip', min_area=2).items] == ['f']*4
    shutil.rmtree(masks)
    fails('no SegmentationClassAug', 'voc', tmp_path)

# ---- arguments -------------------------------------------------------------------------------------------------------------
def test_bad_arguments(tmp_path):
    fails("did you mean 'deepglobe'", 'deepglob', tmp_path)
    fails("did you mean 'trn'", 'fss', tmp_path, 'trian')
    fails('no such folder', 'voc', tmp_path/'nowhere')
    polyps(tmp_path)
    fails('on_error', 'kvasir', tmp_path, on_error='ignore')
    for name in DATASETS.keys() - {'kvasir'}: fails('under', name, tmp_path)

# ---- the fingerprint -------------------------------------------------------------------------------------------------------
def test_fingerprint(tmp_path):
    polyps(tmp_path/'here')
    shutil.copytree(tmp_path/'here', tmp_path/'there')
    a, b = (open_dataset('kvasir', tmp_path/d) for d in ('here', 'there'))
    assert a.fingerprint() == b.fingerprint() != a.without([0]).fingerprint()
    for file in (b.items[3].image, b.items[4].mask):
        blob = bytearray(file.read_bytes()); blob[-3] ^= 1; file.write_bytes(blob)
        assert open_dataset('kvasir', tmp_path/'there').fingerprint() != a.fingerprint()
        blob[-3] ^= 1; file.write_bytes(blob)
    assert open_dataset('kvasir', tmp_path/'there').fingerprint() == a.fingerprint()
    b = open_dataset('kvasir', tmp_path/'there')
    b.items[0].image.unlink()
    with pytest.raises(InputError, match='0.jpg: cannot be read'): b.fingerprint()

def test_without(tmp_path):
    d = open_dataset('voc', voc(tmp_path, {'a': [1, 2], 'b': [1], 'c': [2]}))
    assert [it.image.stem for it in d.without([1]).items] == ['a', 'b', 'c']
    less = d.without(['VOC2012/JPEGImages/a.jpg'])
    assert [it.image.stem for it in less.items] == ['b', 'c'] and less.by_class == {0: [0], 1: [1]} and len(d) == 4

# ---- real images -----------------------------------------------------------------------------------------------------------
@pytest.mark.real
def test_real_counts(real_data):
    counts = {n: len(open_dataset(n, real_data)) for n in ('isic', 'chest', 'davis', 'nuclei', 'cracks', 'kvasir')}
    assert counts == {'isic': 600, 'chest': 120, 'davis': 200, 'nuclei': 80, 'cracks': 118, 'kvasir': 5}
    assert [len(v) for v in open_dataset('isic', real_data).by_class.values()] == [200]*3
    assert [len(v) for v in open_dataset('davis', real_data).by_class.values()] == [10]*20
    train, val = open_dataset('voc', real_data), open_dataset('voc', real_data, 'val')
    images = {it.id for it in train.items}, {it.id for it in val.items}
    assert len(images[0] | images[1]) == 1000 and not images[0] & images[1]
    assert 'aeroplane' not in {train.classes[it.cls] for it in train.items + val.items}
    # the README's table of images per class counts from about 600 pixels
    table = dict(dog=383, cat=292, person=224, horse=115, chair=113, cow=110, sheep=110, sofa=108, plant=58, car=57, tv=41, bottle=31, table=23)
    both = Counter(VOC[it.cls] for s in ('trn', 'val') for it in open_dataset('voc', real_data, s, min_area=600).items)
    assert {c: both[c] for c in table} == table and all(both[c] < 10 for c in set(VOC) - set(table))
    fails('whole .* tiles', 'deepglobe', real_data)
