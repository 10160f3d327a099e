"The explorer: what its dials do to numbers."
import html
import numpy as np, pytest, torch
from dataclasses import replace
from cdfss.basics import InputError
from cdfss.diagnostics.frequency import band_filter
from cdfss.diagnostics.subject import open_subject
from cdfss.explore import Dials, ExploreOptions, Explorer, Panel, apm_mask, noisy, picture
from cdfss.methods.lfm import mask_frequencies

SMALL = dict(targets='isic', test_episodes=12)

@pytest.fixture(scope='module')
def explorer(miniature):
    return Explorer(open_subject('ssp+lcm', data_root=str(miniature), size=96, backbone='miniature', shots='1,5', **SMALL))

def test_neutral_dials_are_the_recipe(explorer):
    for dials in (Dials(), Dials(noise=dict.fromkeys(explorer.stages, 0.)), Dials(cutoff=1.2), Dials(lcm=explorer.lcm)):
        view = explorer.look('isic', 5, 3, dials)
        assert np.array_equal(view.mask, view.before) and np.array_equal(view.coarse, view.coarse_before) and view.iou == view.iou_before

@pytest.mark.parametrize('dials', [Dials(noise={'stem': .7}), Dials(amplitude='low'), Dials(phase='high'), Dials(apm=.2)], ids=str)
def test_a_dial_changes_the_scores_the_same_way_each_time(explorer, dials):
    first, again = explorer.look('isic', dials=dials), explorer.look('isic', dials=dials)
    assert not np.array_equal(first.coarse, first.coarse_before) and np.array_equal(first.coarse, again.coarse)
    assert explorer.look('isic').iou == first.iou_before

@pytest.mark.parametrize('n', range(4))
def test_noise_reaches_only_what_lies_behind(explorer, n):
    still, noisy = explorer.look('isic'), explorer.look('isic', dials=Dials(noise={explorer.stages[n]: .5}))
    same = [np.array_equal(still.stages[s], noisy.stages[s]) for s in explorer.stages]
    assert same == [k < n for k in range(len(same))]

def test_noise_has_the_strength_it_says(explorer):
    x = torch.randn(3, 8, 20, 20) + 1
    assert ((noisy(x, .5) - x).square().mean((1, 2, 3))/x.square().mean((1, 2, 3))).sqrt().tolist() == pytest.approx([.5]*3, rel=.05)
    assert noisy(x, 0) is x and torch.equal(noisy(x, .5), noisy(x, .5))

def test_the_mask_is_an_apm_mask():
    x = torch.rand(2, 5, 13, 13)
    zero, half = (apm_mask(g, .4) for g in (1., .5))
    assert torch.equal(mask_frequencies(x, zero, torch.zeros_like(zero)), x)
    halved = mask_frequencies(x, half, torch.zeros_like(half))
    assert torch.allclose(halved, (x + band_filter(x, 'low', 'all', .4))/2, atol=1e-4)

def test_lcm_dials_are_lcm(explorer):
    o = replace(explorer.lcm, k=2, w=1., beta=.9, patch=2)
    view = explorer.look('isic', dials=Dials(lcm=o))
    h, w = view.coarse.shape
    assert view.similarity.shape == (2, -(-h//2), -(-w//2)) and len(view.anchors) == 2
    assert view.similarity[0][view.anchors[0]] == pytest.approx(1, abs=1e-5)
    added = (view.similarity - .9).sum(0).repeat(2, 0).repeat(2, 1)[:h, :w]
    assert np.allclose(view.correction, added, atol=1e-4)

def test_the_picture_has_a_panel_for_everything(explorer):
    one, five = (picture(explorer.look('isic', k), side=48) for k in (1, 5))
    assert one.size == (7*54, 2*72) and five.size == (7*54, 3*72)
    assert one.tobytes() == picture(explorer.look('isic', 1), side=48).tobytes() != picture(explorer.look('isic', 1, 1), side=48).tobytes()

def test_the_panel_follows_its_widgets_and_tells_bad_names():
    with pytest.raises(InputError, match="unknown method 'spp'"): Panel(ExploreOptions(run='spp', **SMALL))
    panel = Panel(ExploreOptions(run='prototype', **SMALL))
    shown = panel.image.value
    for widget, value in ((panel.noise['stage1'], 1.), (panel.lcm['w'], 1.), (panel.episode, 3), (panel.amplitude, 'low')):
        widget.value = value
        assert panel.image.value != shown and panel.note.value.startswith('<b>IoU')
        shown = panel.image.value
    panel.what.value = 'nonsense'
    assert "unknown method 'nonsense'" in html.unescape(panel.note.value) and panel.image.value == shown
    panel.what.value = 'ssp'
    assert panel.explorer.subject.name == 'ssp' and panel.noise['stage1'].value == 0
