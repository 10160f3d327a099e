"Activation energy, dead channels and maps against plain loops."
import copy
import numpy as np
import pytest, torch
from cdfss.basics import InputError
from cdfss.data.images import ImageStore, to_input
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.diagnostics.activations import activation_maps, activations, images_of, study
from episodes import segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def sets(miniature):
    def opened(name, split=None):
        data = open_dataset(name, miniature, split)
        return ImageStore(data, 64), draw('balanced', data, 1, episodes=12)
    return {'voc': opened('voc', 'trn'), 'isic': opened('isic')}

@torch.no_grad()
def slow(seg, store, at):
    "Stage -> (n c h w), one image at a time."
    found = [seg.backbone(to_input(store.image(p)[None], seg.backbone.mean, seg.backbone.std)) for p in at]
    return {s: torch.cat([f[s] for f in found]).numpy() for s in seg.backbone.names}

def test_images_are_distinct_and_seeded(sets):
    for store, manifest in sets.values():
        everything = images_of(manifest, 10**6)
        shown = {store.dataset.items[p].image for q, s, _ in manifest.episodes for p in (q, *s)}
        assert {store.dataset.items[p].image for p in everything} == shown and len(everything) == len(shown)
        assert images_of(manifest, 5) == everything[:5] and images_of(manifest, 5, seed=1) != everything[:5]

def test_table_equals_plain_loops(sets):
    seg, eps = segmenter('ssp'), .05
    frame = activations({'m': seg}, sets, images=10, eps=eps, chunk=4).set_index(['target', 'stage'])
    ruler = slow(seg, sets['voc'][0], images_of(sets['voc'][1], 10))
    for target, (store, manifest) in sets.items():
        for s, f in slow(seg, store, images_of(manifest, 10)).items():
            row, unit = frame.loc[target, s], (ruler[s]**2).mean()
            assert row.energy == pytest.approx((f**2).mean(), rel=1e-4) and row['mean'] == pytest.approx(np.abs(f).mean(), rel=1e-4)
            assert row.relative == pytest.approx((f**2).mean()/unit, rel=1e-4) and row.low < row.energy < row.high
            assert row.dead == pytest.approx(np.mean([np.abs(f[:, c]).max() <= eps*unit**.5 for c in range(f.shape[1])])) and row.channels == f.shape[1]
    assert (frame.loc['voc'].relative == 1).all() and (frame.images == 10).all()

def test_dead_channels_are_found_and_the_source_is_the_ruler(sets):
    seg = segmenter('ssp')
    mute = copy.deepcopy(seg)
    norm = [m for m in mute.backbone.stages['stem'].modules() if isinstance(m, torch.nn.BatchNorm2d)][-1]
    with torch.no_grad(): norm.weight[:8], norm.bias[:8] = 0, 0
    frame = activations({'live': seg, 'mute': mute}, sets, images=6).query("stage == 'stem'").set_index(['model', 'target'])
    assert (frame.loc['mute'].dead == 8/32).all() and (frame.loc['live'].dead == 0).all()
    with torch.no_grad(): norm.weight[:], norm.bias[:] = 0, 0
    silent = activations({'mute': mute}, sets, images=6).query("stage == 'stem'")
    assert (silent.dead == 1).all() and (silent.energy == 0).all() and silent.relative.notna().all()
    halved = copy.deepcopy(seg)
    with torch.no_grad(): norm = [m for m in halved.backbone.stages['stem'].modules() if isinstance(m, torch.nn.BatchNorm2d)][-1]; norm.weight *= 1e-3; norm.bias *= 1e-3
    assert (activations({'m': halved}, sets, images=6).query("stage == 'stem'").dead == 0).all()      # a smaller scale alone kills nothing

def test_maps(sets):
    seg, (store, manifest) = segmenter('ssp'), sets['isic']
    at = images_of(manifest, 5)
    maps = activation_maps(seg, store, at, chunk=2)
    for s, f in slow(seg, store, at).items(): np.testing.assert_allclose(maps[s], np.abs(f).mean(1), rtol=1e-4, atol=1e-6)

def test_study_and_errors(sets):
    frame = study(segmenter('ssp'), sets['voc'], {'isic': sets['isic']}, episodes=4, images=6, before=segmenter('ssp', seed=1))['activations']
    assert list(frame.model.unique()) == ['pretrained', 'trained'] and list(frame.target.unique()) == ['voc', 'isic']
    assert list(study(segmenter('ssp'), sets['voc'], {}, episodes=4)['activations'].model.unique()) == ['trained']
    with pytest.raises(InputError, match='at least one segmenter'): activations({}, sets)
