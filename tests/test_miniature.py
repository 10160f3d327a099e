"The miniature benchmark: its bytes, its layouts, its self-check; and the backbone that ships with it."
import csv
import importlib.util
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cdfss.basics import InputError, file_hash
from cdfss.data import drawing, miniature, pretraining

TINY = {'VOC2012': 16, 'FSS-1000': 8, 'Deepglobe': 2, 'ISIC': 6, 'LungSegmentation': 5}


def arrays(folder, pattern): return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob(pattern))}


@pytest.fixture(scope='module')
def tiny(tmp_path_factory): return miniature.make(tmp_path_factory.mktemp('tiny'), counts=TINY, workers=1)


def test_workers_and_progress_change_no_byte(tiny, tmp_path):
    calls = []
    again = miniature.make(tmp_path, counts=TINY, workers=2, progress=lambda done, jobs: calls.append((done, jobs)))
    assert miniature._hashes(again) == miniature._hashes(tiny)
    assert calls == [(i + 1, sum(TINY.values())) for i in range(sum(TINY.values()))]


def test_another_seed_draws_other_pictures(tiny, tmp_path):
    other = miniature.make(tmp_path, seed=1, counts={k: 1 for k in TINY}, workers=1)
    name = 'VOC2012/JPEGImages/2012_000001.jpg'
    assert file_hash(other / name) != file_hash(tiny / name)


@pytest.mark.parametrize('index', [0, 7, 44])
def test_same_index_same_pixels(index):
    draw = lambda: miniature.source_scene(np.random.default_rng([0, 0, 0, index]), index)
    assert all(np.array_equal(a, b) for a, b in zip(draw(), draw()))
    assert np.array_equal(pretraining.draw(index), pretraining.draw(index))


def test_source_layout(tiny):
    root = tiny / 'VOC2012'
    lists = {n: (root / f'ImageSets/Segmentation/{n}.txt').read_text().split() for n in ('trainaug', 'val')}
    images, labels = arrays(root, 'JPEGImages/*.jpg'), arrays(root, 'SegmentationClassAug/*.png')
    assert [Path(n).stem for n in images] == [Path(n).stem for n in labels] == sorted(lists['trainaug'] + lists['val'])
    assert not set(lists['trainaug']) & set(lists['val'])
    for i, label in enumerate(labels.values()):
        assert label.shape == (96, 96) and label.dtype == np.uint8
        assert set(np.unique(label)) <= {*range(16), 255}
        assert i % 15 + 1 in label                                            # the class this scene was made for is there
        thing, void = (label > 0) & (label < 255), label == 255
        assert 0 < void.sum() < thing.sum() * 2
        near = np.zeros_like(thing)
        for dy in range(-2, 3):
            for dx in range(-2, 3): near |= np.roll(thing, (dy, dx), (0, 1))
        assert not (void & ~near).any()                                       # void is only a thin ring around things
    assert all(x.shape == (96, 96, 3) for x in images.values())
    assert Image.open(next((root / 'SegmentationClassAug').glob('*.png'))).mode == 'P'


def test_near_layout(tiny):
    lists = [(tiny / f'splits/fss/{n}.txt').read_text().split() for n in ('trn', 'val', 'test')]
    folders = sorted(p.name for p in (tiny / 'FSS-1000').iterdir())
    assert sorted(sum(lists, [])) == folders and all(lists) and not set(folders) & set(miniature.SOURCE)
    for name in folders:
        assert {p.name for p in (tiny / 'FSS-1000' / name).iterdir()} == {f'{i}.{e}' for i in range(1, 11) for e in ('jpg', 'png')}
        for mask in arrays(tiny / 'FSS-1000' / name, '*.png').values():
            assert mask.shape == (96, 96, 3) and set(np.unique(mask)) == {0, 255} and (mask == mask[..., :1]).all()


def test_land_cover_layout(tiny):
    root = tiny / 'Deepglobe/04_train_cat'
    images = sorted(root.glob('*/test/origin/*'))
    assert {p.parts[-4] for p in images} <= set('123456') and len(images) > 6
    covered = {}
    for p in images:
        found = re.fullmatch(r'(\d+)_sat_(\d\d)\.jpg', p.name)
        mask = np.asarray(Image.open(p.parents[1] / 'groundtruth' / f'{found[1]}_mask_{found[2]}.png'))
        assert set(np.unique(mask)) == {0, 255}
        share = (mask > 0).mean()
        assert share > .048                                                   # the filter of the protocol: even the rarest cover is that large
        covered[p.name] = covered.get(p.name, 0) + share
    assert all(abs(v - 1) < 1e-9 for v in covered.values())                   # the classes' masks of one patch tile it


def test_lesion_layout(tiny):
    rows = list(csv.DictReader((tiny / 'ISIC/class_id.csv').open()))
    folder = {'nevus': '1', 'seborrheic_keratosis': '2', 'melanoma': '3'}
    assert len(rows) == TINY['ISIC'] and set(rows[0]) == {'ID', 'Class'}
    for row in rows:
        assert (tiny / 'ISIC/ISIC2018_Task1-2_Training_Input' / folder[row['Class']] / f"{row['ID']}.jpg").exists()
        mask = np.asarray(Image.open(tiny / 'ISIC/ISIC2018_Task1_Training_GroundTruth' / f"{row['ID']}_segmentation.png"))
        assert mask.ndim == 2 and set(np.unique(mask)) == {0, 255}


def test_lung_layout(tiny):
    films, masks = arrays(tiny / 'LungSegmentation/CXR_png', '*'), arrays(tiny / 'LungSegmentation/masks', '*')
    assert {n.split('_')[0] for n in films} == {'CHNCXR', 'MCUCXR'}
    assert set(masks) == {n if n.startswith('MCU') else n.replace('.png', '_mask.png') for n in films}
    assert all(x.shape == (96, 96) for x in films.values()) and all(set(np.unique(m)) == {0, 255} for m in masks.values())


def test_unknown_data_set_is_refused(tmp_path):
    with pytest.raises(InputError, match="unknown data set 'COCO'"): miniature.make(tmp_path, counts={'COCO': 3})


@pytest.fixture
def small_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('CDFSS_CACHE', str(tmp_path))
    monkeypatch.setattr(miniature, 'COUNTS', {k: 1 for k in TINY})
    return tmp_path


def test_targets_alone_where_nothing_is_drawn(small_cache):
    targets = miniature.miniature_root(workers=1, source=False)
    assert not list((targets / 'VOC2012').rglob('*.jpg')) and miniature.damage(targets) is None
    whole = miniature.miniature_root(workers=1)
    assert whole != targets and miniature.miniature_root(workers=1, source=False) == whole
    film = next((targets / 'LungSegmentation/CXR_png').iterdir())
    assert film.read_bytes() == (whole / film.relative_to(targets)).read_bytes()


def test_damage_is_noticed_and_mended(small_cache, capsys):
    root = miniature.miniature_root(workers=1)
    hashes = miniature._hashes(root)
    assert capsys.readouterr().out == '' and miniature.miniature_root(workers=1) == root
    film = next((root / 'LungSegmentation/CXR_png').iterdir())
    good = film.read_bytes()
    film.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))                       # the same size, one bit
    assert miniature.damage(root) == f'LungSegmentation/CXR_png/{film.name} has changed'
    film.unlink()
    assert miniature.damage(root) == f'LungSegmentation/CXR_png/{film.name} is missing'
    miniature.miniature_root(workers=1)
    assert 'is missing; drawing it again' in capsys.readouterr().out
    (root / 'splits/extra.txt').write_text('x')
    assert 'is not in the manifest' in miniature.damage(root)
    (root / 'MANIFEST.json').write_text('{')
    assert 'no readable MANIFEST' in miniature.damage(root)
    assert miniature._hashes(miniature.miniature_root(workers=1)) == hashes
    assert [p.name for p in small_cache.iterdir()] == ['miniature-v1-seed0']  # nothing left over


def test_two_processes_at_once_are_safe(small_cache):
    code = ("from cdfss.data import miniature; miniature.COUNTS = {k: 1 for k in miniature.COUNTS}\n"
            "root = miniature.miniature_root(workers=1); assert miniature.damage(root) is None")
    crew = [subprocess.Popen([sys.executable, '-c', code]) for _ in range(2)]
    assert [p.wait(60) for p in crew] == [0, 0]
    assert [p.name for p in small_cache.iterdir()] == ['miniature-v1-seed0']


def test_a_failing_worker_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match='nowhere'): drawing.fan_out('cdfss.data.nowhere:draw', [], 2, 2)


# the backbone

@pytest.fixture(scope='module')
def weights(): return Path(str(files('cdfss') / 'assets/miniature_resnet.safetensors'))


def test_weights_are_those_of_the_record(weights):
    record = json.loads(weights.with_suffix('.json').read_text())
    assert weights.stat().st_size <= 4 * 2 ** 20
    assert record['weights_sha256'] == file_hash(weights)
    assert record['history'][-1]['epoch'] == record['epochs'] and record['classes'] == len(pretraining.KINDS)


def test_weights_load_strictly_and_know_fresh_pictures(weights):
    record = json.loads(weights.with_suffix('.json').read_text())
    net = pretraining.pretrained_net(classifier=True)
    fresh = np.stack([pretraining.draw(i, split=3) for i in range(300)])
    assert pretraining.accuracy(net, fresh) >= record['val_accuracy'] - 5
    features = pretraining.pretrained_net()
    assert features(torch.zeros(1, 3, 96, 96)).shape == (1, 256) and not features.training


def test_training_runs_and_records(tmp_path):
    record = pretraining.train(tmp_path / 'w.safetensors', images=200, validation=100, epochs=1, batch=50, workers=1, log=lambda *_: None)
    assert record['weights_sha256'] == file_hash(tmp_path / 'w.safetensors')
    assert json.loads((tmp_path / 'w.json').read_text()) == record and 0 <= record['val_accuracy'] <= 100
