"IFA: one round against SSP, the chain, copies of supports as queries, and pools that never hold the query they answer."
import dataclasses
import pytest, torch
from cdfss.basics import InputError
from cdfss.data.guard import Ledger
from cdfss.data.images import ImageStore, collate
from cdfss.data.layouts import open_dataset
from cdfss.engine.adapt import AdaptOptions, Tuner, answer, draw_pools, read_supports, tune_together
from cdfss.engine.evaluate import Twins, predict
from cdfss.methods.ifa import IFA, IFAOptions, augmented, back, step
from episodes import backbone, episode, segmenter
from fakes import polyps

pytestmark = pytest.mark.usefixtures('one_thread')

def adapting(seg):
    seg.eval().adapting = True
    return seg

# ---- rounds -----------------------------------------------------------------------------------------------------------------
def test_source_loss_is_ssp_s_and_one_term_more():
    e = episode(2, 2)
    a, b = segmenter('ssp').train().loss(e), segmenter('ifa').train().loss(e)
    assert list(b) == [*a, 'back1'] and all(torch.equal(a[n], b[n]) for n in a)
    assert torch.equal(segmenter('ssp')(e).scores, segmenter('ifa')(e).scores)

@pytest.mark.parametrize('rounds', [1, 2, 4])
def test_tuning_has_a_pair_of_terms_for_each_further_round(rounds):
    seg = adapting(segmenter('ifa', {'ifa_rounds': rounds}))
    found = [n for n in seg.loss(episode(2)) if n[-1].isdigit()]
    assert found == ['back1', *(f'{w}{i}' for i in range(2, rounds + 1) for w in ('query', 'back'))]

def test_one_shot_of_one_episode_is_the_same_in_the_reference_order():
    for b, k, same in ((1, 1, True), (1, 3, True), (3, 1, True), (2, 2, False)):
        e = episode(b, k)
        with torch.no_grad(): x, y = (adapting(segmenter('ifa', {'ifa_reference': r})).loss(e) for r in (False, True))
        assert torch.allclose(x['back1'], y['back1'], atol=1e-6) == same

@torch.no_grad()
def test_round_keeps_to_each_episode():
    g = torch.Generator().manual_seed(0)
    q, s, fg, bg = torch.randn(3, 16, 6, 6, generator=g), torch.randn(3, 2, 16, 6, 6, generator=g), torch.randn(3, 16, generator=g), torch.randn(3, 16, generator=g)
    def both(i):
        o = IFAOptions()
        answer, fg1, bg1 = step(q[i], fg[i], bg[i], fg[i], o)
        return answer, *back(s[i], fg1, bg1, fg[i], o)
    for whole, *alone in zip(both(slice(None)), *(both(slice(i, i + 1)) for i in range(3))): assert torch.allclose(whole, torch.cat(alone), atol=1e-5)

# ---- copies of supports -----------------------------------------------------------------------------------------------------
def test_augmentation_moves_image_and_masks_together():
    image = torch.zeros(3, 40, 40)
    mask = torch.zeros(2, 40, 40, dtype=torch.bool)
    mask[0, 3:9, 5:20], mask[1, 30:, :4] = True, True
    image[:, mask[0]] = 1.0
    for dataset in ('deepglobe', 'isic'):
        moved = 0
        for seed in range(12):
            torch.manual_seed(seed)
            im, m = augmented(image, mask, dataset, (0.,)*3, (1.,)*3)
            assert m.dtype == torch.bool and m.sum((1, 2)).tolist() == mask.sum((1, 2)).tolist() and not (m[0] & m[1]).any()
            inside, outside = im.mean(0)[m[0]], im.mean(0)[~m[0]]
            assert inside.min() > outside.max()
            moved += not torch.equal(m, mask)
        assert moved >= 8

def test_augmentation_keeps_the_scale_of_normalised_images():
    mean, std = (.485, .456, .406), (.229, .224, .225)
    x = torch.full((3, 16, 16), .5).sub(torch.tensor(mean).view(3, 1, 1)).div(torch.tensor(std).view(3, 1, 1))
    torch.manual_seed(0)
    im, _ = augmented(x, torch.zeros(1, 16, 16, dtype=torch.bool), 'isic', mean, std)
    grey = im*torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert 0 <= grey.min() and grey.max() <= 1 and (grey - .5).abs().max() < .3 and (grey[0] - grey[1]).abs().max() < 1e-5

def test_tuning_does_not_look_at_the_query():
    seg, e = adapting(segmenter('ifa')), episode(2, 2)
    blind = dataclasses.replace(e, query=torch.full_like(e.query, torch.nan), query_mask=~e.query_mask)
    def terms(e):
        torch.manual_seed(0)
        return seg.adapt_loss(e)
    a, b = terms(e), terms(blind)
    assert all(torch.equal(a[n], b[n]) for n in a)

def test_what_is_tuned():
    seg = segmenter('ifa', freeze='stem+stage1')
    assert seg.adaptable() and all(n.startswith(('backbone.stages.stage2', 'backbone.stages.stage3')) and 'bn' not in n for n in seg.adaptable())
    assert seg.tuning.pool == 'fixed' and segmenter('ifa', {'ifa_support_policy': 'task'}).tuning.pool == 'task'
    plain = segmenter('ifa', {'ifa_stage': 'bfp'})
    assert plain.tuning is None and plain.adaptable() == [] and not Tuner().adapts(plain)

# ---- pools ------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def store(tmp_path):
    polyps(tmp_path/'data', 9, (64, 64))
    return ImageStore(open_dataset('kvasir', tmp_path/'data'), 64, cache=tmp_path/'cache')

def test_pools_have_no_image_in_common(store):
    for shot in (1, 4):
        a, b = draw_pools(store, shot)
        assert [len(t) for t in (*a, *b)] == [shot, shot] and not set(a[0]) & set(b[0]) and draw_pools(store, shot) == [a, b]
    with pytest.raises(InputError, match='two pools of 5 need 10'): draw_pools(store, 5)

def tuner(**o): return Tuner(AdaptOptions(**dict(adapt_steps=2) | o))

def test_no_query_is_answered_by_weights_that_saw_it(store):
    seg, t = segmenter('ifa'), tuner()
    held = draw_pools(store, 1)[0][0][0]
    others = [p for p in range(9) if p not in {task[0] for pool in draw_pools(store, 1) for task in pool}]
    asked = [(held, (others[0],), 0), (others[1], (others[0],), 0), (others[2], (held,), 0)]
    read = []
    use = t.ledger.use
    t.ledger.use = lambda ids: (ids := list(ids), read.append(ids), use(ids))[-1]
    values = t(seg, store, asked)
    n = next(iter(values))
    assert torch.equal(values[n][1], values[n][2]) and not torch.equal(values[n][0], values[n][1])
    first, second = ({store.dataset.items[p].id for task in pool for p in task} for pool in draw_pools(store, 1))
    assert {i for ids in read for i in ids} == first | second and t.ledger.used == 2*2 and not t.ledger.breaches
    before = len(read)
    again = t(seg, store, asked[1:])
    assert len(read) == before and torch.equal(again[n][0], values[n][1])                  # tuned once for the whole target

def test_tuning_on_a_pool_goes_round_the_whole_chain(store):
    asked, found = [(0, (1,), 0)], {}
    for rounds in (1, 3): found[rounds] = tuner()(segmenter('ifa', {'ifa_rounds': rounds}), store, asked)
    assert all(not torch.equal(found[1][n], found[3][n]) for n in found[1])

def test_reading_supports_leaves_the_phase_as_it_is(store):
    seg = adapting(segmenter('ifa'))
    read_supports(store, [(0,)], Ledger(on=False), seg)
    assert seg.phase == 'adapt'

def test_tuned_weights_do_not_depend_on_order_or_batch(store):
    asked = [(p, ((p + 1) % 9,), 0) for p in range(9)]
    a, b = tuner()(segmenter('ifa'), store, asked), tuner()(segmenter('ifa'), store, asked[::-1])
    assert all(torch.equal(a[n], b[n].flip(0)) for n in a)

def test_the_paper_s_pool_is_a_breach(store):
    seg = segmenter('ifa', {'ifa_support_policy': 'paper'})
    asked = [(p, ((p + 1) % 9,), 0) for p in range(9)]
    with pytest.raises(InputError, match='not among the'): tuner(adapt_steps=8)(seg, store, asked)
    t = Tuner(AdaptOptions(adapt_steps=8), Ledger(on=False))
    t(seg, store, asked)
    assert t.ledger.breaches and not t.ledger.record['on']

def test_tuning_lowers_its_loss_and_leaves_the_segmenter_alone(store):
    seg = segmenter('ifa')
    before = {n: v.clone() for n, v in seg.state_dict().items()}
    asked = [(0, (1,), 0), (2, (3,), 0)]
    masks, _, _ = predict({'ifa': seg, 'plain': segmenter('ssp')}, store, asked, None, tuner=tuner(adapt_steps=4, adapt_lr=1e-2))
    assert all(torch.equal(v, before[n]) for n, v in seg.state_dict().items()) and not seg.adapting
    assert not torch.equal(masks['ifa'], masks['plain'])

def test_each_image_is_encoded_once_a_pool(store):
    methods, t = {'ifa': segmenter('ifa'), 'plain': segmenter('ssp')}, tuner(adapt_lr=1e-2)
    asked = [(p, ((p + 1) % 9, (p + 2) % 9), 0) for p in range(9)]
    which = t.which_pool(store, asked)
    with Twins(store, t) as twins:
        for i in range(0, 9, 4): masks, target, void = predict(methods, store, asked[i:i + 4], None, tuner=t, twins=twins)
        seen = {w: {p for (q, s, _), x in zip(asked, which) if x == w for p in (q, *s)} for w in set(which)}
        assert set(seen) == {0, 1} and {w: f.encoded for (_, _, w), (_, f) in twins.made.items()} == {w: len(s) for w, s in seen.items()}
        assert all(f.segmenter is made and made is not methods['ifa'] for made, f in twins.made.values())
    masks, target, void = predict(methods, store, asked, None, tuner=t)
    net = methods['ifa'].backbone
    batch = collate(store, asked, net.mean, net.std)
    with torch.inference_mode(): each = torch.cat([p.mask for p in answer(methods['ifa'], t(methods['ifa'], store, asked), batch, (64, 64))])
    assert list(masks) == ['ifa', 'plain'] and (masks['ifa'] == each).float().mean() > .9995 and not torch.equal(masks['ifa'], masks['plain'])
    assert torch.equal(target, batch.query_mask) and torch.equal(void, batch.ignore)

def test_steps_follow_the_plan(store):
    seg, seen = segmenter('ifa'), []
    def draw(step):
        seen.append(step)
        yield dataclasses.replace(episode(2), domain='isic')
    values = tune_together(seg, draw, dataclasses.replace(seg.tuning, steps=3, lr=0.0))
    assert seen == [0, 1, 2] and all(torch.equal(v, seg.get_parameter(n)) for n, v in values.items())
    with pytest.raises(InputError, match='not finite'): tune_together(seg, draw, dataclasses.replace(seg.tuning, steps=3, lr=1e30))
