"Which layers are compared: names, one grid, the choice from supports alone, and that nothing else is looked at."
import importlib.util
from dataclasses import replace
import numpy as np
import pytest, torch
import torch.nn.functional as F
from cdfss.basics import InputError
from cdfss.data.guard import Ledger
from cdfss.data.images import ImageStore
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.engine import evaluate as engine
from cdfss.engine.adapt import Tuner
from cdfss.engine.evaluate import FeatureStore, choice_on, choices, evaluate, needed_stages, predict, stored_match
from cdfss.engine.metrics import COUNTS
from cdfss.methods.seams import build
from cdfss.models.layers import largest, on_grid, support_agreement, tasks
from cdfss.models.segmenter import Match
from episodes import backbone, episode, segmenter
from families import PLAIN, tiny

pytestmark = pytest.mark.usefixtures('one_thread')
BASES = ['prototype', 'ssp']

def of(base, layers, recipe=None, **o): return segmenter(recipe or base, {f'{base}_layers': layers}, **o)

# ---- names and maps ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('text,reason', [('stage9', "unknown layer in layers 'stage9'"), ('auto:stage2,stage8', "'stage8'"), ('stage2+', "unknown layer in layers ''"), ('auto:last,stage3', "'stage3' is named twice"), ('auto:', "unknown layer")])
def test_wrong_names(text, reason):
    with pytest.raises(InputError, match=reason) as e: of('ssp', text)
    assert '\n' not in str(e.value)

def test_the_last_layer_by_any_name_is_the_paper_s():
    e = episode(3, 2)
    with torch.no_grad():
        want = segmenter('ssp')(e)
        for text in ('last', 'stage3', 'auto:last'): assert torch.equal(of('ssp', text)(e).scores, want.scores), text
        assert not torch.allclose(of('ssp', 'stage2')(e).scores, want.scores, atol=.1)

@pytest.mark.parametrize('base', BASES)
@torch.no_grad()
def test_one_layer_is_compared_as_if_it_were_the_last(base):
    "A backbone that ends with stage2 gives the same scores (both have stride 8)."
    long = of(base, 'stage2')
    short = segmenter(base, last_stage='stage2', last_relu=True)
    short.backbone.load_state_dict({k: v for k, v in long.backbone.state_dict().items() if not k.startswith('stages.stage3')})
    e = episode(2, 3)
    torch.testing.assert_close(long(e).scores, short(e).scores, atol=1e-4, rtol=1e-4)

@torch.no_grad()
def test_side_by_side_is_the_mean_of_cosines():
    seg, e = of('prototype', 'stage1+stage3'), episode(2, 1)
    m = seg.match(e)
    view = seg.viewed(m, 'stage1+stage3')
    f = view.query['stage1+stage3']
    size = m.query['stage3'].shape[-2:]
    parts = [F.adaptive_avg_pool2d(m.query['stage1'], size), m.query['stage3']]
    torch.testing.assert_close((f*f.flip(0)).sum(1)/2, sum(F.cosine_similarity(p, p.flip(0)) for p in parts)/2, atol=1e-5, rtol=1e-4)
    assert f.shape[1] == sum(p.shape[1] for p in parts) and seg.reads == ('stage1', 'stage3')
    up = on_grid(torch.arange(4.).view(1, 1, 2, 2), (3, 3))
    torch.testing.assert_close(up[0, 0], torch.tensor([[0, .5, 1], [1, 1.5, 2], [2, 2.5, 3]]))

# ---- the choice -------------------------------------------------------------------------------------------------------------
def planted(b=4, k=1, good=None, seed=0):
    "A match of two layers: in one, object and ground lie apart; the other is noise. `good[i]` says which, per task."
    g = torch.Generator().manual_seed(seed)
    masks = torch.zeros(b, k + 1, 16, 16)
    masks[..., 4:12, 4:12] = 1
    noise = lambda: torch.randn(b, k + 1, 8, 16, 16, generator=g)
    clear = torch.randn(b, 1, 8, 2, generator=g)
    clean = torch.where(masks[:, :, None] > 0, clear[..., :1, None], clear[..., 1:, None]) + .1*noise()
    other, good = noise(), torch.tensor(good or [0, 1]*(b//2))
    first = good.view(-1, 1, 1, 1, 1) == 0
    stages = {'a': torch.where(first, clean, other), 'b': torch.where(first, other, clean)}
    return Match({n: f[:, 0] for n, f in stages.items()}, {n: f[:, 1:] for n, f in stages.items()}, masks[:, 1:], 1 - masks[:, 1:]), good, masks[:, 0]

def chooser(base='prototype', temperature=.1):
    seg = segmenter(base, {f'{base}_layers': 'auto:stage2,stage3', f'{base}_temperature': temperature})
    seg.views, seg.reads = ('a', 'b'), ('a', 'b')
    return seg

@pytest.mark.parametrize('base', BASES)
@pytest.mark.parametrize('k', [1, 2, 5])
@torch.no_grad()
def test_the_layer_that_tells_object_from_ground_is_chosen(base, k):
    seg = chooser(base)
    m, good, want = planted(4, k)
    assert largest(seg.choose(m)).tolist() == good.tolist()
    sharp = chooser(base, 0.).choose(m)
    assert sharp.tolist() == F.one_hot(good, 2).tolist()
    assert torch.equal(seg.choose(m), (seg.agreements(m)/.1).softmax(1)) and torch.allclose(chooser(base, 1e6).choose(m), torch.full((4, 2), .5), atol=1e-4)
    p = seg.decide(m, (16, 16))
    hit = (p.mask == (want > 0)).float().mean((1, 2))
    assert hit.min() > .95
    worse = seg.decide(replace(m, choice=1 - sharp), (16, 16))
    assert (worse.mask == (want > 0)).float().mean((1, 2)).max() < hit.min()

@pytest.mark.parametrize('temperature', [0., .1])
@torch.no_grad()
def test_a_batch_is_its_tasks_one_by_one(temperature):
    (m, good, _) = planted(5, 2, good=[0, 0, 1, 0, 1])
    seg = chooser('ssp', temperature)
    m.query['b'], m.support['b'] = F.pad(m.query['b'], (0, 0, 0, 0, 0, 3)), F.pad(m.support['b'], (0, 0, 0, 0, 0, 3))      # a wider layer
    whole = seg.compare(m)
    for i in range(5):
        one = seg.compare(tasks(m, torch.tensor([i])))
        torch.testing.assert_close(whole['scores'][i], one['scores'][0], atol=1e-4, rtol=1e-4)
        width = one['fg_prototype'].shape[1]
        assert whole['fg_prototype'].shape[1] == 11 and not whole['fg_prototype'][i, width:].any()
        torch.testing.assert_close(whole['fg_prototype'][i, :width], one['fg_prototype'][0])
    one, weights = tasks(m, torch.tensor([2])), seg.choose(m)[2]
    alone = [seg.compare_at(seg.viewed(one, v), v)['scores'][0] for v in 'ab']
    torch.testing.assert_close(whole['scores'][2], sum(w*a for w, a in zip(weights, alone)), atol=1e-4, rtol=1e-4)
    if temperature == 0: assert torch.allclose(whole['scores'][2], alone[1], atol=1e-4)

@torch.no_grad()
def test_the_choice_sees_supports_only():
    seg, e = of('ssp', 'auto'), episode(4, 2)
    chosen = seg.choose(seg.match(e))
    other = episode(4, 2, seed=9)
    m = seg.match(e)
    blind = replace(m, query={n: torch.full_like(f, torch.nan) for n, f in m.query.items()})
    assert torch.equal(seg.choose(blind), chosen)
    torch.testing.assert_close(seg.choose(seg.match(replace(e, query=other.query, query_mask=None, ignore=None))), chosen, atol=1e-5, rtol=1e-4)
    agree = seg.agreements(m)
    assert agree.shape == (4, len(seg.views)) and ((agree >= 0) & (agree <= 1)).all()
    assert not torch.allclose(agree, seg.agreements(seg.match(replace(e, support_masks=other.support_masks))))              # and it does see them

@torch.no_grad()
def test_ignored_pixels_do_not_count_and_ties_go_deep():
    f, fg = torch.randn(2, 3, 5, 8, 8), (torch.rand(2, 3, 8, 8) > .5).float()
    void = torch.zeros(2, 3, 8, 8, dtype=torch.bool)
    void[..., :3] = True
    wild = torch.where(void[:, :, None], 100*torch.randn_like(f), f)
    a, b = (support_agreement(x, fg*~void, (1 - fg)*~void) for x in (f, wild))
    torch.testing.assert_close(a, b)
    m, _, _ = planted(2, 1)
    m.query['b'], m.support['b'] = m.query['a'], m.support['a']
    assert chooser(temperature=0.).choose(m).tolist() == [[0, 1]]*2
    assert support_agreement(f, torch.zeros_like(fg), torch.ones_like(fg)).tolist() == [0, 0]                              # no foreground left: finite

# ---- through the engine -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def isic(miniature):
    data = open_dataset('isic', miniature)
    return ImageStore(data, 64), {k: draw('balanced', data, k, episodes=5) for k in (1, 2)}

@pytest.mark.parametrize('recipe,k', [('ssp', 1), ('prototype', 2), ('ssp+lcm', 1), ('hsl', 2)])
def test_stored_features_give_what_the_whole_pass_gives(isic, recipe, k):
    store, manifest = isic[0], isic[1][k]
    base = recipe if recipe == 'prototype' else 'ssp'
    seg = of(base, 'auto', recipe)
    got = evaluate({'m': seg}, store, manifest, epoch=0)[list(COUNTS)].to_numpy()
    apart = evaluate({'m': seg}, store, manifest, epoch=0, batch=1)[list(COUNTS)].to_numpy()
    np.testing.assert_array_equal(got, apart)
    masks, target, void = predict({'m': seg}, store, manifest.episodes, None)
    want = engine.confusion(masks['m'], target, void).numpy()
    assert np.abs(got - want).max() <= 2 and got.sum() == want.sum()

def test_no_image_is_encoded_twice(isic):
    store, manifest = isic[0], isic[1][2]
    seg, plain = of('ssp', 'auto'), of('ssp', 'last')
    both = {'auto': seg, 'last': build('ssp', seg.backbone).eval()}
    with FeatureStore(seg, store, needed_stages(both)) as features:
        evaluate(both, store, manifest, epoch=0, features=features)
        assert features.encoded == len({p for q, s, _ in manifest.episodes for p in (q, *s)})

def test_the_ledger_watches_the_choice(isic, monkeypatch):
    store, manifest = isic[0], isic[1][2]
    seg, ledger = of('ssp', 'auto'), Ledger()
    with FeatureStore(seg, store, needed_stages({'m': seg})) as features, torch.no_grad():
        plain = choices(seg, store, manifest.episodes, features, ledger)
        assert ledger.used == len(manifest) and not ledger.breaches
        match, _, _ = stored_match(features, store, manifest.episodes, 'cpu')
        torch.testing.assert_close(plain, seg.choose(match))
        q, s, c = manifest.episodes[0]
        with ledger.allow(store.dataset.items[p].id for p in s), pytest.raises(InputError, match='not among the 2 supports'):
            choice_on(seg, store, (*s, q), features, ledger)                                           # planted: the query helps to choose
        leaky = lambda g, st, eps, f, ledger, device: torch.cat([choice_on(g, st, (q,), f, ledger, device) for q, _, _ in eps])
        monkeypatch.setattr(engine, 'choices', leaky)
        with pytest.raises(InputError, match='outside any episode'): predict({'m': seg}, store, manifest.episodes, features, tuner=Tuner(ledger=ledger))

@pytest.mark.parametrize('layers', ['stage2', 'stage2+stage3', 'auto'])
@pytest.mark.parametrize('base', [*BASES, 'ifa'])
def test_training_reads_the_last_candidate(base, layers):
    if base == 'ifa' and layers != 'auto':
        with pytest.raises(InputError, match='ifa_layers=stage2.*use last, or auto'): of(base, layers)
        return
    seg, e = of(base, layers, bn='eval').train(), episode(2)
    terms = seg.loss(e)
    sum(terms.values()).backward()
    moved = {n.split('.')[2] for n, p in seg.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {'stem', 'stage1', 'stage2'} | ({'stage3'} if 'stage3' in seg.views[-1] else set()) and all(torch.isfinite(t) for t in terms.values())
    if layers == 'auto': assert {n: float(v) for n, v in terms.items()} == {n: float(v) for n, v in of(base, 'last', bn='eval').train().loss(e).items()}

@pytest.mark.parametrize('name', PLAIN)
@torch.no_grad()
def test_every_family_has_layers_to_choose_from(name):
    seg, e = build('ssp', tiny(name), {'ssp_layers': 'auto'}).eval(), episode(3, 2, size=64)
    assert len(seg.views) >= 2 and seg.views[-1] == seg.backbone.names[-1] and 'stem' not in seg.views
    assert seg(e).mask.shape == (3, 64, 64) and seg.agreements(seg.match(e)).isfinite().all()

def test_the_readme_s_table_is_what_the_benchmark_wrote(repo):
    spec = importlib.util.spec_from_file_location('layers_benchmark', repo/'benchmarks'/'layers.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = module.table(repo/'figures'/'layers.csv')
    assert rows and '\n'.join(rows) in (repo/'README.md').read_text()
