"PASCAL-5i and COCO-20i: which classes are novel, what the readers list, and a run on a fold."
import dataclasses
import numpy as np
import pytest
from PIL import Image
from cdfss.basics import InputError
from cdfss.data import folds
from cdfss.data.folds import BAM_AREA, base_labels, without_novel
from cdfss.data.layouts import FOLD_RULES, FOLDS, VOID, fold_classes, open_dataset
from cdfss.data.manifests import draw
from cdfss.engine.metrics import COUNTS
from cdfss.engine.protocols import PROTOCOLS, compare
from cdfss.engine import train as module
from cdfss.engine.train import TrainSettings, open_run, prepare, resolve
from cdfss.report import tables

@pytest.mark.parametrize('how', FOLD_RULES)
@pytest.mark.parametrize('n', [15, 20, 80])
def test_every_class_is_novel_in_one_fold(n, how):
    assert sorted(c for f in range(FOLDS) for c in fold_classes(n, f, how)) == list(range(n))

def test_what_does_not_exist():
    with pytest.raises(InputError, match='fold=4: expected 0 to 3'): fold_classes(20, 4)
    with pytest.raises(InputError, match="unknown fold rule 'block': did you mean 'blocks'"): fold_classes(20, 0, 'block')

def picture(root, split, name, *values, size=100):
    "An image with a stripe of 1,000 pixels of each value."
    label = np.zeros((size, size), np.uint8)
    for k, v in enumerate(values): label[10*k:10*k + 10] = v
    for folder, array, suffix in (('', np.repeat(label[..., None], 3, 2), 'jpg'), ('masks_index/', label, 'png')):
        (root/f'COCO/{folder}{split}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root/f'COCO/{folder}{split}/{name}.{suffix}')

@pytest.fixture
def coco(tmp_path):
    (tmp_path/'COCO').mkdir()
    (tmp_path/'COCO/classes.txt').write_text(''.join(f'c{i}\n' for i in range(8)))
    picture(tmp_path, 'train2014', 'a', 1, 1, 1, VOID)            # class 0, of 3,000 pixels
    picture(tmp_path, 'train2014', 'b', 2, 5)                     # classes 1 and 4, of 1,000 each
    picture(tmp_path, 'train2014', 'c', 3, 3, 3)                  # class 2, of 3,000
    picture(tmp_path, 'val2014', 'd', 1, 2, 8)
    return tmp_path

def seen(data): return {(it.image.stem, it.cls) for it in data.items}

def test_coco_folds(coco):
    opened = lambda split, **kw: seen(open_dataset('coco', coco, split, **kw))
    assert opened('trn') == {('a', 0), ('b', 1), ('b', 4), ('c', 2)} and opened('val') == {('d', 0), ('d', 1), ('d', 7)}
    assert opened('trn0') == {('b', 1), ('c', 2)} and opened('val0') == {('d', 0)}
    assert opened('trn0-blocks') == {('b', 4), ('c', 2)} and opened('val0-blocks') == {('d', 0), ('d', 1)}
    assert opened('trn', min_area=BAM_AREA) == {('a', 0), ('c', 2)}

def test_images_with_novel_classes_go(coco, monkeypatch):
    trn = open_dataset('coco', coco, 'trn0')
    with monkeypatch.context() as m:
        m.setattr(folds, 'index_areas', lambda mask: pytest.fail(f'{mask} was decoded twice'))
        kept = without_novel(trn, fold_classes(8, 0, 'interleaved'))
    trn.areas.clear()                                                                          # as of a reader that had lists
    assert seen(without_novel(trn, fold_classes(8, 0, 'interleaved'))) == seen(kept)
    assert seen(kept) == {('c', 2)} and kept.notes == ['1 of 2 images show a novel class and are dropped']
    with pytest.raises(InputError, match='every image shows a novel class'): without_novel(open_dataset('coco', coco, 'trn'), range(8))

def test_faulty_coco(coco):
    (coco/'COCO/train2014/c.jpg').unlink()
    with pytest.raises(InputError, match='c.jpg: missing image'): open_dataset('coco', coco, 'trn')
    (coco/'COCO/classes.txt').unlink()
    with pytest.raises(InputError, match='no COCO/classes.txt'): open_dataset('coco', coco, 'trn')
    with pytest.raises(InputError, match='kind=index'): open_dataset('coco', bare(coco/'elsewhere'), 'trn')

def bare(root):
    (root/'COCO/train2014').mkdir(parents=True)
    return root

def test_base_map():
    mask = np.array([[0, 1, 2, 5, 6, VOID]], np.uint8)
    assert base_labels(mask, (0, 4), 8).tolist() == [[0, 0, 1, 0, 4, VOID]]
    whole = base_labels(np.arange(256, dtype=np.uint8)[None], fold_classes(20, 2), 20)
    assert sorted(set(whole[0].tolist()) - {0, VOID}) == list(range(1, 16))                    # PASCAL-5i: 15 and background

# ---- a run on a fold -----------------------------------------------------------------------------------------------------------
def folded(**kw): return resolve(TrainSettings(**dict(method='ssp', weights='none', protocol='pascal-5i', fold=0, shots='1', test_episodes=5) | kw))

@pytest.mark.parametrize('kw,reason', [(dict(fold=None), 'expected a fold, 0 to 3'), (dict(protocol='patnet'), "protocol 'patnet' with fold=0: expected no fold"),
                                       (dict(fold=4), 'fold=4: expected at most 3'), (dict(manifest='x.json'), 'drawn by protocol=pascal-5i')])
def test_impossible_folds(kw, reason):
    with pytest.raises(InputError, match=reason): folded(**kw)

def test_settings_of_a_fold_are_settled():
    s = folded(fold=2)
    assert (s.source, s.targets) == ('voc', 'voc-fold2') and resolve(s) == s

@pytest.mark.parametrize('protocol,fold', [('pascal-5i', 0), ('pascal-5i-dropped', 3)])
def test_source_and_target_share_no_class(protocol, fold):
    data = prepare(folded(protocol=protocol, fold=fold))
    novel, classes = set(fold_classes(15, fold)), lambda store: {it.cls for it in store.dataset.items}
    assert classes(data.source) == set(range(15)) - novel == classes(data.validation) and classes(data.targets[f'voc-fold{fold}']) == novel
    assert all(e[2] in novel for e in data.manifests[f'voc-fold{fold}', 1].episodes)
    assert bool(data.source.dataset.notes and 'novel' in data.source.dataset.notes[-1]) == protocol.endswith('dropped')

def test_a_run_without_a_fold_keeps_its_folder(monkeypatch):
    s, hashed = folded(), []
    data = prepare(s)
    monkeypatch.setattr(module, 'run_hash', lambda settings: str(hashed.append(settings)))
    for one in (s, dataclasses.replace(s, fold=None)): open_run(one, data)
    assert hashed[0]['fold'] == 0 and hashed[1] == {k: v for k, v in hashed[0].items() if k != 'fold'}

@pytest.mark.parametrize('protocol,given,size,area', [('pascal-5i', None, 'working', 1), ('pascal-5i-dropped', None, 'native', 1), ('pascal-5i', 'native', 'native', 1)])
def test_where_a_protocol_counts(protocol, given, size, area):
    s = folded(protocol=protocol, eval_size=given)
    assert (s.eval_size, s.min_area) == (size, area) and resolve(s) == s
    data = prepare(s)
    assert {m.eval_size for m in (*data.manifests.values(), *data.followed.values())} == {size}
    assert {store.pad for store in (data.source, data.validation, *data.targets.values())} == {size == 'native'}

def test_where_it_is_counted_decides_the_folder_and_the_tables(tmp_path):
    few = dict(epochs=0, track='none', samples=0, runs=str(tmp_path))
    a, b = (module.train(folded(eval_size=e, **few), say=lambda line: None) for e in ('working', 'native'))
    assert a.path != b.path and (a.counted, b.counted) == ('96 px', 'native') and set(b.episodes.eval_size) == {'native'} and 'eval_size' not in a.episodes
    assert a.episodes[list(COUNTS)].equals(b.episodes[list(COUNTS)])                       # the miniature's pictures have 96 pixels: the same, said otherwise
    with pytest.raises(InputError, match='rows of different counting sizes do not belong in one table'): tables.wide(tables.results([a.path, b.path]))
    with pytest.raises(InputError, match='was counted at 96 px, .* at native'): compare(a, b)
    assert 'Protocol pascal-5i, counted at native' in tables.wide(tables.results([b.path])).attrs['caption']
    with pytest.raises(InputError, match='its answers are counted at native size; give eval_size=native'):
        prepare(resolve(TrainSettings(method='ssp', weights='none', manifest=str(given_at(tmp_path/'m')))))

def given_at(folder):
    isic = open_dataset('isic', module.miniature_root())
    dataclasses.replace(draw('patnet', isic, 1, episodes=3), eval_size='native').save(folder/'isic.json')
    return folder

def test_area_of_the_lists_on_real_data(tmp_path):
    assert folded(protocol='pascal-5i-dropped', data_root=str(tmp_path), backbone='miniature').min_area == BAM_AREA
    assert folded(protocol='pascal-5i-dropped', data_root=str(tmp_path), backbone='miniature', min_area=9).min_area == 9

def test_queries_go_image_by_image(coco):
    d = open_dataset('coco', coco, 'trn')
    m = draw('bam', dataclasses.replace(d, items=[it for _ in range(1) for it in (*d.items, *[dataclasses.replace(it, id='x' + it.id, image=it.image.with_name('x' + it.image.name)) for it in d.items])]), 1, episodes=60)
    images = [ids[0] for ids in m.ids]
    assert len(set(images[:6])) == 6 and images[6:12] == images[:6]                              # each image once, then again
    assert {c for ids, (_, _, c) in zip(m.ids, m.episodes) if ids[0].endswith('/b.jpg')} == {1, 4}           # either of its classes

def test_a_run_of_a_fold_is_whole(tmp_path):
    "Its target carries the fold in its name from the first epoch to the results."
    from cdfss.engine.train import TrainSettings, train
    run = train(TrainSettings(method='ssp', protocol='pascal-5i', fold=0, epochs=1, fit_episodes=4, test_episodes=6, track_episodes=4, shots='1', samples=1, runs=str(tmp_path)), say=lambda line: None)
    [row] = run.metrics['results']
    assert row['target'] == 'voc-fold0' and row['episodes'] == 6 and set(run.episodes.target) == {'voc-fold0'} and 'miou/ssp/voc-fold0' in run.history
