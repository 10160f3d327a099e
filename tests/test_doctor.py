"The doctor: every kind of fault planted once, the published variants, and the real images beside the checkout."
import json, shutil, time
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from cdfss.basics import InputError
from cdfss.data import doctor as D
from cdfss.data.doctor import doctor
from cdfss.data.layouts import DATASETS, DataSet, Item
from cdfss.data.prepare import ISIC_NUMBERINGS, prepare_isic

def grey(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path

def photo(path, seed, size=(20, 24)): return grey(path, np.random.default_rng(seed).integers(0, 255, (*size, 3)))

DISC = np.zeros((20, 24), np.uint8); DISC[5:12, 6:15] = 255

def lungs(root, n=6):
    for k in range(n):
        name = f'{"MCUCXR" if k % 2 else "CHNCXR"}_{k:04d}_0'
        photo(root/f'LungSegmentation/CXR_png/{name}.png', k)
        grey(root/f'LungSegmentation/masks/{name}{"" if k % 2 else "_mask"}.png', DISC)
    return root/'LungSegmentation'

def found(report, finding, dataset=None):
    "The lines of one kind of finding."
    rows = report.findings[(report.findings['finding'] == finding) & (True if dataset is None else report.findings['dataset'] == dataset)]
    return [line for files in rows['files'] for line in files]

def test_a_healthy_folder(tmp_path):
    lungs(tmp_path)
    r = doctor(tmp_path)
    assert r.ok and r.datasets.to_dict('records') == [dict(dataset='chest', images=6, pairs=6, classes=1, variant=r.datasets['variant'][0])]
    assert 'Shenzhen 3, Montgomery 3' in str(r) and 'no faults' in str(r) and '12 files hashed, 6 decoded' in str(r) and 'lung 6' in str(r)
    assert json.loads(json.dumps(r.to_dict()))['counts'] == [{'dataset': 'chest', 'class': 'lung', 'images': 6}]

def test_each_fault_of_a_binary_set(tmp_path):
    base = lungs(tmp_path, 12)
    images, masks = sorted((base/'CXR_png').iterdir()), {p.name.replace('_mask', ''): p for p in (base/'masks').iterdir()}
    mask = lambda k: masks[images[k].name]
    grey(mask(0), DISC // 255)
    grey(mask(1), DISC[:10])
    grey(mask(2), DISC * 0)
    grey(mask(3), DISC // 2 + 90)
    mask(4).write_bytes(mask(4).read_bytes()[:50])
    images[5].write_bytes(images[5].read_bytes()[:200])
    images[6].write_text('<html>')
    images[7].unlink()
    shutil.copy(images[8], images[9])
    r = doctor(tmp_path)
    rel = lambda p: p.relative_to(tmp_path).as_posix()
    assert not r.ok
    assert found(r, 'values 0 and 1') == [rel(mask(0))]
    assert found(r, 'wrong size') == [f'{rel(images[1])} is 24x20, its mask 24x10']
    assert found(r, 'empty mask') == [rel(mask(2))]
    assert found(r, 'grey values') == [rel(mask(3))]
    assert sorted(l.split(':')[0] for l in found(r, 'unreadable')) == sorted(map(rel, (mask(4), images[5], images[6])))
    assert [rel(images[7]) in l for l in found(r, 'missing partner')] == [True]
    assert found(r, 'copy within') == [f'{rel(images[8])} = {rel(images[9])}']
    assert len(r.findings) == 7 and all(a in str(r) for a in r.findings['advice']) and str(tmp_path) + '/' not in str(r)
    assert set(doctor(tmp_path, decode='none').findings['finding']) == {'wrong size', 'unreadable', 'missing partner', 'copy within'}

def test_turned_and_odd_pictures_are_no_faults(tmp_path):
    from PIL import ImageOps
    im = Image.open(photo(tmp_path/'Kvasir-SEG/images/0.jpg', 0, (24, 20)))
    exif = im.getexif(); exif[0x0112] = 6
    im.save(tmp_path/'Kvasir-SEG/images/0.jpg', exif=exif)                  # upright it is 24 wide
    grey(tmp_path/'Kvasir-SEG/masks/0.png', DISC)
    photo(tmp_path/'Kvasir-SEG/images/1.jpg', 1)
    with open(tmp_path/'Kvasir-SEG/images/1.jpg', 'ab') as f: f.write(bytes(5000))                   # padding behind the end mark
    grey(tmp_path/'Kvasir-SEG/masks/1.png', np.stack([DISC] * 3, -1))
    assert doctor(tmp_path).ok and doctor(tmp_path, decode='all').ok

def test_pixels_are_decoded_on_request(tmp_path):
    base = lungs(tmp_path)
    image = base/'CXR_png/CHNCXR_0000_0.png'
    data = bytearray(image.read_bytes())
    data[len(data)//2] ^= 255                                             # header and end are whole
    image.write_bytes(data)
    assert doctor(tmp_path).ok and 'CHNCXR_0000_0' in found(doctor(tmp_path, decode='all'), 'unreadable')[0]

def test_copies_across_data_sets(tmp_path):
    lungs(tmp_path)
    photo(tmp_path/'CrackForest/image/x.png', 3); grey(tmp_path/'CrackForest/masks/x.png', DISC)
    r = doctor(tmp_path)
    assert found(r, 'copy across', 'chest + cracks') == ['LungSegmentation/CXR_png/MCUCXR_0003_0.png = CrackForest/image/x.png'] and not r.ok

def test_deepglobe_patches_shared_by_classes(tmp_path):
    for c, n in [(1, 0), (2, 0), (2, 1), (3, 2)]:
        photo(tmp_path/f'Deepglobe/{c}/test/origin/{n}_sat_00.jpg', min(n, 1))
        grey(tmp_path/f'Deepglobe/{c}/test/groundtruth/{n}_mask_00.png', DISC)
    r = doctor(tmp_path)
    assert len(found(r, 'copy within')) == 1 and '3 distinct patches' in r.datasets['variant'][0]                # 1 and 2 are copies, 0 is one patch of two classes
    photo(tmp_path/'raw/Deepglobe/5_sat.jpg', 0)
    assert 'cut them into chips first' in found(doctor(tmp_path/'raw'), 'not ready')[0]

def voc(root, masks, train, val=None):
    base = root/'VOC2012'
    for k, (i, values) in enumerate(masks.items()):
        photo(base/f'JPEGImages/{i}.jpg', k); grey(base/f'SegmentationClassAug/{i}.png', values)
    lists = base/'ImageSets/Segmentation'
    lists.mkdir(parents=True, exist_ok=True)
    (lists/'trainaug.txt').write_text('\n'.join(train))
    if val: (lists/'val.txt').write_text('\n'.join(val))

def test_voc(tmp_path):
    m = np.where(DISC, 3, 0)
    m[0] = 255
    voc(tmp_path, {'a': m, 'b': m + 2, 'c': np.where(DISC, 40, 0) + (m == 3) * 0, 'd': m}, ['a', 'b', 'd'], ['c', 'd'])
    strange = np.where(DISC, 40, 0); strange[1] = 7
    grey(tmp_path/'VOC2012/SegmentationClassAug/c.png', strange)
    Image.fromarray(np.stack([DISC] * 3, -1)).save(tmp_path/'VOC2012/SegmentationClassAug/b.png')
    r = doctor(tmp_path)
    assert found(r, 'no such class') == ['VOC2012/SegmentationClassAug/c.png has the value 40']
    assert found(r, 'lists overlap') == ['VOC2012/JPEGImages/d.jpg'] and 'b.png: mode RGB' in found(r, 'unreadable')[0]
    assert 'none of the published (3 images in trainaug.txt' in str(r)

def test_isic_numbering_and_mixed_folder(tmp_path):
    from test_prepare import isic_raw
    isic_raw(tmp_path/'src')
    for k, p in enumerate(sorted((tmp_path/'src/a').rglob('*.jpg'))): photo(p, k, (12, 16))
    for scheme, order in ISIC_NUMBERINGS.items():
        prepare_isic(tmp_path/'src', tmp_path/scheme, scheme, 'copy')
        r = doctor(tmp_path/scheme)
        assert f"numbering '{scheme}': 1 = {order[0]}, 2 = {order[1]}" in str(r) and r.ok
    base = tmp_path/'ifa/ISIC/ISIC2018_Task1-2_Training_Input'
    moved = next((base/'1').iterdir())
    moved.rename(base/'2'/moved.name)
    assert found(doctor(tmp_path/'ifa'), 'mixed folder') == ['ISIC/ISIC2018_Task1-2_Training_Input/2: nevus 1, seborrheic_keratosis 3']

def fss(root, split, counts):
    for c, n in counts.items():
        for k in range(n): photo(root/f'FSS-1000/{c}/{k + 1}.jpg', hash((c, k)) % 2**32); grey(root/f'FSS-1000/{c}/{k + 1}.png', DISC)
    (root/'splits/fss').mkdir(parents=True, exist_ok=True)
    for s, names in split.items(): (root/f'splits/fss/{s}.txt').write_text('\n'.join(names))

def test_fss_lists(tmp_path):
    fss(tmp_path, dict(trn=['a'], val=['b'], test=['b', 'gone']), dict(a=10, b=10, c=9))
    r = doctor(tmp_path)
    assert found(r, 'lists overlap') == ['b in test and val'] and 'c has 9 images, published 10' in found(r, 'class count')
    assert "1 classes, the published 'val' has 240" in found(r, 'class count') and 'gone' in found(r, 'missing partner')[0]
    shutil.rmtree(tmp_path/'splits')
    assert len(found(doctor(tmp_path), 'not ready')) == 3

def sized(name, counts, image='{c}/{n}.jpg'):
    files = [Path(image.format(c=c + 1, n=10_000*c + n)) for c, k in enumerate(counts) for n in range(k)]
    return DataSet(name, Path(), 'test', tuple('123456'[:len(counts)]), [Item(str(f), f, f, int(f.parent.name) - 1) for f in files])

def test_published_variants():
    assert "PATNet's paper" in D.variant(sized('deepglobe', (5000, 666))) and 'released script' in D.variant(sized('deepglobe', (9175,)))
    assert 'class by class' in D.variant(sized('deepglobe', (6891, 4189, 4333, 1564, 1370, 2195))) and sum(D.IFA_PATCHES) == 20542
    assert 'ABCDFSS' in D.variant(sized('deepglobe', (1833,))) and 'none of the published' in D.variant(sized('deepglobe', (1834,)))
    many = sized('deepglobe', (9175,))
    twice = many.items + [Item(it.id, Path('2')/it.image.name, it.mask, 1) for it in many.items[:700]]            # distinct patches are met too
    assert 'released script' in D.variant(DataSet('deepglobe', Path(), 'test', ('1', '2'), twice))
    assert "'ifa'" in D.variant(sized('isic', (1867, 208, 519))) and "'dr-adapter'" in D.variant(sized('isic', (208, 1867, 519)))
    assert 'no published numbering' in D.variant(sized('isic', (519, 208, 1867)))
    chest = [Item(n, Path(n), Path(n), 0) for n in [f'CHNCXR_{k}' for k in range(566)] + [f'MCUCXR_{k}' for k in range(138)]]
    assert 'Kaggle' in D.variant(DataSet('chest', Path(), 'test', ('lung',), chest)) and 'alone' in D.variant(DataSet('chest', Path(), 'test', ('lung',), chest[:566]))

def test_voc_trainaug_is_counted_by_lines(tmp_path):
    voc(tmp_path, {'a': np.where(DISC, 3, 0)}, ['a'] + [f'x{n}' for n in range(10_581)], ['y'])
    r = doctor(tmp_path)
    assert 'trainaug, VOC 2012 + SBD (10,582 images' in str(r)
    assert len(found(r, 'missing partner')) == 10_581 and "split 'val'" in found(r, 'not ready')[0]                # a list that is no use does not hide the other

def test_every_data_set_has_a_home(): assert D.HOMES.keys() == DATASETS.keys()

def test_bad_arguments(tmp_path):
    for words, args in (('no such folder', (tmp_path/'gone',)), ('none of the known data sets', (tmp_path,)), ("'maks'", (tmp_path, 'maks'))):
        with pytest.raises(InputError, match=words): doctor(*args)

def test_ten_thousand_files_take_under_a_minute(tmp_path):
    "A thousand pairs of the patches' size, in a tenth of a minute of processor time on two cores."
    base, rng = lungs(tmp_path, 1), np.random.default_rng(0)
    noise, mask = Image.fromarray(rng.integers(0, 255, (408, 408, 3), dtype=np.uint8)), Image.fromarray(DISC).resize((408, 408))
    noise.save(tmp_path/'noise.jpg'); mask.save(tmp_path/'mask.png')
    data = (tmp_path/'noise.jpg').read_bytes()
    for n in range(1000):
        (base/f'CXR_png/CHNCXR_{n + 10}_0.png').write_bytes(data + bytes([n % 256, n // 256, 255, 217]))     # JPEGs by content; each another file
        shutil.copy(tmp_path/'mask.png', base/f'masks/CHNCXR_{n + 10}_0_mask.png')
    began = time.process_time()
    r = doctor(tmp_path)
    assert r.ok and time.process_time() - began < 2 * 60 * 2002 / 10_000

@pytest.mark.real
def test_the_real_images(real_data):
    r = doctor(real_data)
    count = {(c['dataset'], c['class']): c['images'] for c in r.counts.to_dict('records')}
    sets = r.datasets.set_index('dataset')
    assert [count['isic', c] for c in ('nevus', 'melanoma', 'seborrheic_keratosis')] == [200] * 3
    assert 'Shenzhen 60, Montgomery 60' in sets.loc['chest', 'variant'] and sets.loc['voc', 'images'] == 1000 and sets.loc['cracks', 'images'] == 118
    assert sets.loc['nuclei', 'images'] == 80 and sets.loc['davis', 'classes'] == 20 and sets.loc['kvasir', 'images'] == 5
    masks = [set(np.unique(np.asarray(Image.open(p)))) for p in (real_data/'VOC2012/SegmentationClassAug').glob('*.png')]
    assert all(count.get(('voc', c), 0) == sum(n in m for m in masks) for n, c in enumerate(DATASETS['voc'].read(real_data, 'trn').classes, 1))
    assert len(found(r, 'grey values', 'kvasir')) == 5 and found(r, 'not ready', 'deepglobe')
    assert set(r.findings['finding']) == {'as read', 'grey values', 'not ready'}                          # nothing else is wrong with them

@pytest.mark.real
def test_real_files_are_prepared(real_data, tmp_path):
    from cdfss.data.prepare import prepare_chest, prepare_deepglobe, prepare_voc
    assert prepare_isic(real_data, tmp_path, 'dr-adapter').jobs == 600 and prepare_chest(real_data, tmp_path).jobs == 120
    assert prepare_deepglobe(real_data/'DeepGlobe', tmp_path).jobs == 3
    r = doctor(tmp_path)
    assert r.ok and "numbering 'dr-adapter'" in str(r) and r.datasets.set_index('dataset').loc['deepglobe', 'pairs'] > 30
