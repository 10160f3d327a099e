"Evaluation: counts are a function of weights and episodes, however they are batched, cached, ordered or decoded."
import dataclasses
import numpy as np
import pandas as pd
import PIL.Image
import pytest, torch
import torch.nn.functional as F
from cdfss.basics import InputError
from cdfss.data.images import ImageStore, collate
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import Manifest, draw
from cdfss.engine.evaluate import FeatureStore, evaluate, lasting_features, needed_stages, predict
from cdfss.engine.fit import FitOptions, fit
from cdfss.engine.metrics import COUNTS, class_miou, confusion, paired_bootstrap
from cdfss.episode import Prediction
from cdfss.methods.seams import MODULES, Module, build
from episodes import backbone, segmenter
from fakes import blob, picture

pytestmark = pytest.mark.usefixtures('one_thread')
SIZE = 64
KEYS = ['target', 'shot', 'method', 'epoch', 'index', 'query', 'supports', 'cls', *COUNTS]

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('decoded')

@pytest.fixture(scope='module')
def store(miniature, cache): return ImageStore(open_dataset('isic', miniature), SIZE, cache=cache)

@pytest.fixture(scope='module')
def manifests(store): return {k: draw('patnet', store.dataset, k, 0, 20) for k in (1, 5)}

@pytest.fixture(scope='module')
def methods():
    net = backbone()
    return {r: build(r, net).eval() for r in ('ssp', 'ssp+lcm', 'prototype')}

def rows(frame): return frame[KEYS].sort_values(['method', 'index'], ignore_index=True)

def images_of(store, manifest): return len({store.key(p) for q, s, _ in manifest.episodes for p in (q, *s)})

@pytest.fixture(scope='module')
def plain(methods, store, manifests):
    "Counts by the plain path: every episode alone, through `forward`, and counted pixel by pixel."
    found = {}
    for shot, m in manifests.items():
        made = []
        for name, s in methods.items():
            for i, e in enumerate(m.episodes):
                batch = collate(store, [e], s.backbone.mean, s.backbone.std)
                with torch.no_grad(): p = s(batch).mask & ~batch.ignore
                t, seen = batch.query_mask & ~batch.ignore, ~batch.ignore
                counts = dict(tp=(p & t).sum(), fp=(p & ~t).sum(), fn=(~p & t).sum(), tn=(~p & ~t & seen).sum())
                made.append(dict(target='isic', shot=shot, method=name, epoch=3, index=i, query=m.ids[i][0], supports=';'.join(m.ids[i][1:]), cls=e[2],
                                 **{k: int(counts[k]) for k in COUNTS}))
        found[shot] = rows(pd.DataFrame(made))
    return found

@pytest.mark.parametrize('shot', [1, 5])
def test_counts_are_those_of_single_episodes(plain, methods, store, manifests, shot):
    assert plain[shot].tp.sum() > 0 and plain[shot][plain[shot].method == 'ssp'].tp.tolist() != plain[shot][plain[shot].method == 'prototype'].tp.tolist()
    assert (plain[shot][list(COUNTS)].sum(axis=1) == SIZE*SIZE).all()
    pd.testing.assert_frame_equal(rows(evaluate(methods, store, manifests[shot], epoch=3)), plain[shot])

@pytest.mark.parametrize('recipe', ['ssp', 'hdmnet', 'ssp+pcmt'])
def test_native_counts_are_those_of_a_plain_loop(tmp_path, recipe):
    "Wide and high images of several sizes; the scores on the padded square are resized to a square of the longer side and cut."
    for i, size in enumerate([(80, 60), (60, 80), (90, 40), (64, 64), (50, 100)]):
        picture(tmp_path/f'Kvasir-SEG/images/{i}.jpg', i, size)
        blob(tmp_path/f'Kvasir-SEG/masks/{i}.png', i, size)
    d = open_dataset('kvasir', tmp_path)
    store, s = ImageStore(d, SIZE, cache=tmp_path/'cache', pad=True), segmenter(recipe)
    manifest = dataclasses.replace(draw('exhaustive', d, 1, episodes=5), eval_size='native')
    found = evaluate({'m': s}, store, manifest, epoch=0, batch=2)
    for row, (q, supports, _) in zip(found.itertuples(), manifest.episodes):
        truth = np.asarray(PIL.Image.open(d.items[q].mask)) >= 128
        h, w = truth.shape
        with torch.no_grad(): p = s(collate(store, [(q, supports, 0)], s.backbone.mean, s.backbone.std))
        shown = torch.stack([~p.mask, p.mask], 1).float() if recipe.endswith('pcmt') else p.scores
        guess = F.interpolate(shown, (max(h, w),)*2, mode='bilinear', align_corners=True)[0].argmax(0)[:h, :w].bool().numpy()
        assert (row.tp, row.fp, row.fn, row.tn) == ((guess & truth).sum(), (guess & ~truth).sum(), (~guess & truth).sum(), (~guess & ~truth).sum())
    assert set(found.eval_size) == {'native'} and found[list(COUNTS)].sum(axis=1).tolist() == [80*60, 60*80, 90*40, 64*64, 50*100]

def test_a_vote_of_shots_is_counted_at_native_size(store, manifests):
    "What is counted comes from the voted mask, not from the mean of the shots' scores, which says something else."
    s = segmenter('hsnet')
    padded, native = ImageStore(store.dataset, SIZE, cache=store.folder.parent, pad=True), manifests[5].episodes[:3]
    odd = lambda match, size: Prediction(torch.stack([torch.ones(len(match.fg), *size), torch.zeros(len(match.fg), *size)], 1), torch.ones(len(match.fg), *size, dtype=torch.bool), torch.zeros(len(match.fg), 2, 1, 1))
    s.answer = odd
    with FeatureStore(s, padded, needed_stages({'m': s})) as features: masks, truth, _ = predict({'m': s}, padded, native, features, native=True)
    assert all(m.all() and m.shape == t.shape for m, t in zip(masks['m'], truth))
    with FeatureStore(s, padded, needed_stages({'m': s})) as features: masks, _, _ = predict({'m': s}, padded, manifests[1].episodes[:3], features, native=True)
    assert not any(m.any() for m in masks['m'])                                             # one shot: what the scores say

def test_sizes_of_counting_do_not_mix(methods, store, manifests):
    working = manifests[1]
    native = dataclasses.replace(working, eval_size='native')
    padded = ImageStore(store.dataset, SIZE, cache=store.folder.parent, pad=True)
    for s, m in ((store, native), (padded, working)):
        with pytest.raises(InputError, match=f'eval_size={m.eval_size}: its images are'): evaluate(methods, s, m, epoch=0)
    a, b = (evaluate({'ssp': methods['ssp']}, s, dataclasses.replace(m, episodes=m.episodes[:3], ids=m.ids[:3]), epoch=0) for s, m in ((store, working), (padded, native)))
    with pytest.raises(InputError, match='mixes eval_size nan, native'): class_miou(pd.concat([a, b]))
    with pytest.raises(InputError, match='the first table of episodes lacks eval_size'): paired_bootstrap(a, b)
    assert working.hash != native.hash and native.first(1).eval_size == 'native'

def test_a_manifest_remembers_where_it_is_counted(manifests, tmp_path):
    native = dataclasses.replace(manifests[1], eval_size='native')
    for m in (manifests[1], native):
        again = Manifest.load(m.save(tmp_path/'m.json'), m.opened)
        assert (again.eval_size, again.hash) == (m.eval_size, m.hash)
    assert 'eval_size' not in manifests[1].to_json()                                       # hashes of before stay

@pytest.mark.parametrize('how', [dict(batch=1), dict(batch=3), dict(batch=16), dict(block=7), dict(block=7, batch=3), dict(block=1), dict(batch=999)])
@pytest.mark.parametrize('shot', [1, 5])
def test_counts_do_not_depend_on_batch_or_block(plain, methods, store, manifests, shot, how):
    pd.testing.assert_frame_equal(rows(evaluate(methods, store, manifests[shot], epoch=3, **how)), plain[shot])

@pytest.mark.parametrize('memory,disk', [(0, 8e9), (0, 0), (3e5, 8e9), (3e5, 2e5), (2e9, 0)])
def test_counts_do_not_depend_on_memory(plain, methods, store, manifests, memory, disk):
    with FeatureStore(methods['ssp'], store, needed_stages(methods), memory=memory, disk=disk) as features:
        frame = evaluate(methods, store, manifests[5], epoch=3, features=features, batch=4)
        folder, encoded = features.folder, features.encoded
        if memory < 1e9: assert (folder is not None) == (disk > 0)
        if memory > 1e9 or disk > 1e9: assert encoded == images_of(store, manifests[5])
        else: assert encoded > images_of(store, manifests[5])
    assert folder is None or not folder.exists(), 'the spilled features were left behind'
    pd.testing.assert_frame_equal(rows(frame), plain[5])

def test_spilled_features_lie_where_a_run_clears_them(methods, store, manifests, tmp_path):
    with FeatureStore(methods['ssp'], store, needed_stages(methods), memory=0, spill=tmp_path/'resume') as features:
        for i in range(3): features.get([i])
        assert features.folder.parent == tmp_path/'resume'

def test_a_full_disk_only_costs_time(plain, methods, store, manifests, monkeypatch):
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('cdfss.engine.evaluate.atomic_write', full)
    with FeatureStore(methods['ssp'], store, needed_stages(methods), memory=3e5) as features:
        frame = evaluate(methods, store, manifests[1], epoch=3, features=features, batch=4)
    pd.testing.assert_frame_equal(rows(frame), plain[1])

def test_every_image_is_encoded_once(methods, store, manifests):
    with FeatureStore(methods['ssp'], store, needed_stages(methods)) as features:
        evaluate(methods, store, manifests[1], epoch=3, features=features)
        first = features.encoded
        assert first == images_of(store, manifests[1]) < 40
        evaluate(methods, store, manifests[1], epoch=3, features=features)
        assert features.encoded == first
        evaluate(methods, store, manifests[5], epoch=3, features=features)
        both = {store.key(p) for m in manifests.values() for q, s, _ in m.episodes for p in (q, *s)}
        assert features.encoded == len(both)

def test_copies_of_an_image_are_encoded_once(methods, store, cache):
    d = store.dataset
    twice = dataclasses.replace(d, items=[*d.items, *(dataclasses.replace(it, id=f'copy/{it.id}') for it in d.items)])
    both = ImageStore(twice, SIZE, cache=cache)
    with FeatureStore(methods['ssp'], both, ('stage3',)) as features:
        got = features.get([0, len(d), 1, len(d) + 1])['stage3']
        assert features.encoded == 2 and torch.equal(got[0], got[1]) and torch.equal(got[2], got[3]) and not torch.equal(got[0], got[2])

def test_order_of_the_episodes_does_not_matter(plain, methods, store, manifests):
    m, order = manifests[1], np.random.default_rng(0).permutation(20)
    other = dataclasses.replace(m, episodes=[m.episodes[i] for i in order], ids=[m.ids[i] for i in order])
    frame = evaluate(methods, store, other, epoch=3, batch=3)
    frame['index'] = order[frame['index']]
    pd.testing.assert_frame_equal(rows(frame), plain[1])

@pytest.mark.parametrize('workers', [1, 4])
def test_decoding_threads_do_not_matter(plain, methods, miniature, manifests, tmp_path, workers):
    fresh = ImageStore(open_dataset('isic', miniature), SIZE, cache=tmp_path, workers=workers)
    fresh.ensure()
    pd.testing.assert_frame_equal(rows(evaluate(methods, fresh, manifests[1], epoch=3)), plain[1])

@pytest.mark.parametrize('shot', [1, 5])
def test_stored_features_give_the_masks_of_forward(methods, store, manifests, shot):
    episodes = manifests[shot].episodes[:6]
    with FeatureStore(methods['ssp'], store, needed_stages(methods)) as features:
        stored, target, void = predict(methods, store, episodes, features)
    direct, target2, void2 = predict(methods, store, episodes, None)
    assert torch.equal(target, target2) and torch.equal(void, void2) and stored.keys() == direct.keys() == methods.keys()
    assert all(torch.equal(stored[n], direct[n]) for n in stored)

class Tilt(Module):
    "Acts at the stage seam at test time, on the support: features can not be shared between roles."
    seams, phases = ('stage',), ('test',)
    def stage(self, name, x, role): return x.flip(-1) if (name, role) == ('stage1', 'support') else x

def test_a_method_that_changes_encoding_is_encoded_per_episode(methods, store, manifests):
    MODULES.register('tilt')(Tilt)
    try: tilted = build('ssp+tilt', methods['ssp'].backbone).eval()
    finally: del MODULES['tilt']
    m = dataclasses.replace(manifests[1], episodes=manifests[1].episodes[:5], ids=manifests[1].ids[:5])
    assert not tilted.shares_encoding and methods['ssp'].shares_encoding
    frame = evaluate({'ssp': methods['ssp'], 'ssp+tilt': tilted}, store, m, epoch=0, batch=2)
    batch = collate(store, m.episodes, tilted.backbone.mean, tilted.backbone.std)
    for name, s in (('ssp', methods['ssp']), ('ssp+tilt', tilted)):
        with torch.no_grad(): want = confusion(s(batch).mask, batch.query_mask, batch.ignore)
        assert frame[frame.method == name][list(COUNTS)].to_numpy().tolist() == want.tolist()
    assert frame[frame.method == 'ssp'].tp.tolist() != frame[frame.method == 'ssp+tilt'].tp.tolist()

def test_only_the_stages_that_are_read_are_kept(methods):
    assert needed_stages({'ssp': methods['ssp']}) == ('stage3',)
    assert needed_stages(methods) == ('stem', 'stage3')

def test_methods_of_training_mode_are_put_to_test(plain, methods, store, manifests):
    for s in methods.values(): s.train()
    pd.testing.assert_frame_equal(rows(evaluate(methods, store, manifests[1], epoch=3)), plain[1])
    assert not any(s.training for s in methods.values())

# ---- parts: finished blocks of an interrupted evaluation --------------------------------------------------------------------
def test_finished_blocks_are_read_not_computed(plain, methods, store, manifests, tmp_path, monkeypatch):
    calls = []
    def stopping(*a, **k):
        calls.append(1)
        if len(calls) == 6: raise KeyboardInterrupt
        return predict(*a, **k)
    monkeypatch.setattr('cdfss.engine.evaluate.predict', stopping)
    with pytest.raises(KeyboardInterrupt): evaluate(methods, store, manifests[1], epoch=3, batch=2, block=4, parts=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, 'two whole blocks of two batches, and nothing of the third'
    calls[:] = [0]*100
    frame = evaluate(methods, store, manifests[1], epoch=3, batch=2, block=4, parts=tmp_path)
    assert len(calls) == 100 + 6
    pd.testing.assert_frame_equal(rows(frame), plain[1])

@pytest.mark.parametrize('damage', ['truncated', 'flipped'])
def test_a_damaged_block_is_computed_again(plain, methods, store, manifests, tmp_path, damage, capsys):
    evaluate(methods, store, manifests[1], epoch=3, block=10, parts=tmp_path)
    part = sorted(tmp_path.iterdir())[0]
    content = bytearray(part.read_bytes())
    if damage == 'truncated': content = content[:len(content)//2]
    else: content[len(content)//4] ^= 16
    part.write_bytes(content)
    frame = evaluate(methods, store, manifests[1], epoch=3, block=10, parts=tmp_path)
    assert capsys.readouterr().err == f'{part.name} is damaged and is computed again\n'
    pd.testing.assert_frame_equal(rows(frame), plain[1])
    pd.testing.assert_frame_equal(rows(evaluate(methods, store, manifests[1], epoch=3, block=10, parts=tmp_path)), plain[1])
    assert not capsys.readouterr().err, 'the block is whole again'

# ---- training on stored features ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('recipe', ['hsnet', 'patnet'])
def test_training_on_stored_features_is_training(store, recipe):
    o, found = FitOptions(epochs=2, fit_episodes=8, batch=4, lr=.01, border='background'), []
    for stored in (True, False):
        seg = segmenter(recipe)
        features = lasting_features(seg.train(), store, seg.needed) if stored else None
        found.append(([r['loss'] for r in fit(seg, store, o, seed=0, features=features)], seg.state_dict()))
        if stored: assert 0 < features.encoded <= len(store.dataset)                   # each image once, whatever the epochs
    (a, left), (b, right) = found
    assert np.allclose(a, b, atol=1e-5) and all(torch.allclose(left[n], right[n], atol=1e-4) for n in left)

def test_features_last_where_training_leaves_them(store):
    last = lambda seg, **how: lasting_features(seg.train(), store, seg.needed, **how)
    assert last(segmenter('hsnet+lcm')) and last(segmenter('hsnet+apm_s'))
    assert last(segmenter('ssp')) is None                                               # its backbone trains
    assert last(segmenter('hsnet+lem')) is None                                         # disturbs a stage
    assert last(segmenter('hsnet', bn='train')) is None and last(segmenter('hsnet'), memory=1e5) is None
