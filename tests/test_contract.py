"What every recipe owes: the same checks over all bases, modules and aliases that are registered."
import dataclasses, re, sys
import pytest, torch
from cdfss.basics import InputError, Options, Registry, option
from cdfss.engine.adapt import pick
from cdfss.engine.fit import autocast
from cdfss.engine.train import SECTIONS, TrainSettings
from cdfss.methods.seams import ALIASES, MODULES, Module, build, discover, method_options, parse_recipe
from cdfss.models.prototype import masked_pool, resize_mask
from cdfss.models.segmenter import BASES, SEAMS, Match
from cdfss.models.ssp import adaptive_prototype, likeness
from episodes import PAIRS, RECIPES, backbone, episode, segmenter

pytestmark = pytest.mark.usefixtures('one_thread')

def acts(m, phase): return phase in MODULES[m].phases

def loss(seg, e, seed=0):
    torch.manual_seed(seed)
    return seg.train().loss(e)

@torch.no_grad()
def scores(seg, e): return seg.eval()(e).scores

# ---- shapes, loss, gradients ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('k,size', [(1, 65), (5, 48)])
def test_shapes_and_loss(recipe, k, size):
    seg, e = segmenter(recipe), episode(2, k, size)
    with torch.no_grad(): p = seg(e)
    assert p.scores.shape == (2, 2, size, size) and p.mask.shape == (2, size, size) and p.mask.dtype == torch.bool
    assert p.coarse.shape[:2] == (2, 2) and p.scores.isfinite().all()
    assert all(k.endswith('prototype') and v.shape[0] == 2 for k, v in p.prototypes.items())
    terms = loss(seg, e)
    assert terms and all(isinstance(n, str) and n.isidentifier() for n in terms)
    assert all(t.shape == () and t.isfinite() and t >= 0 for t in terms.values()) and sum(terms.values()) > 0

@pytest.mark.parametrize('recipe', RECIPES)
def test_gradients_reach_what_trains_and_nothing_else(recipe):
    seg = segmenter(recipe, freeze='stem+stage1', bn='frozen')
    norms = {id(p) for m in seg.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
    still = {id(p) for s in ('stem', 'stage1') for p in seg.backbone.stages[s].parameters()} | norms
    still |= {id(p) for m in seg.extras if 'fit' not in m.phases for p in m.parameters()}          # tuned on a target, or never
    sum(loss(seg, episode(2, size=129)).values()).backward()
    for name, p in seg.named_parameters():
        if id(p) in still: assert p.grad is None and not p.requires_grad, name
        else: assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name

@pytest.mark.parametrize('recipe', RECIPES)
def test_bf16_is_finite(recipe):
    seg, e = segmenter(recipe), episode(2)
    with autocast('bf16', 'cpu'):
        terms = loss(seg, e)
        assert scores(seg, e).isfinite().all()
    sum(terms.values()).backward()
    assert all(t.isfinite() for t in terms.values()) and all(p.grad.isfinite().all() for p in seg.parameters() if p.requires_grad)

# ---- prediction is a function of the weights and the episode ----------------------------------------------------------------
@pytest.mark.parametrize('recipe', RECIPES)
def test_prediction_is_deterministic_and_of_each_episode_alone(recipe):
    seg, e = segmenter(recipe), episode(3)
    torch.manual_seed(1)
    together = scores(seg, e)
    torch.manual_seed(2)
    assert torch.equal(together, scores(seg, e))
    alone = torch.cat([scores(seg, pick(e, i)) for i in range(3)])
    assert (together - alone).abs().max() < 1e-4

@pytest.mark.parametrize('recipe', RECIPES)
def test_weights_carry_everything(recipe):
    a, b, e = segmenter(recipe, seed=0), segmenter(recipe, seed=1), episode(2)
    before = scores(a, e)
    assert not torch.equal(before, scores(b, e))
    b.load_state_dict(a.state_dict(), strict=True)
    assert torch.equal(before, scores(b, e))

@pytest.mark.parametrize('recipe', RECIPES)
def test_five_equal_supports_are_one(recipe):
    if parse_recipe(recipe).base == 'hdmnet': pytest.skip('its matching adds up over the supports (models/15_hdmnet)')
    seg, one = segmenter(recipe), episode(2)
    many = lambda t: t.expand(-1, 5, *t.shape[2:])
    five = dataclasses.replace(one, support=many(one.support), support_masks=many(one.support_masks), support_ignore=many(one.support_ignore),
                               extras={n: torch.cat([m[:, :1], many(m[:, 1:])], 1) for n, m in one.extras.items()})
    assert (scores(seg, one) - scores(seg, five)).abs().max() < 1e-4

# ---- modules: neutral, and quiet outside their phases -----------------------------------------------------------------------
@pytest.mark.parametrize('base,m', PAIRS)
def test_neutral_module_is_the_base_exactly(base, m):
    assert MODULES[m].neutral, f'{m} has no neutral setting'
    plain, neutral, e = segmenter(base), segmenter(f'{base}+{m}', {f'{m}_{k}': v for k, v in MODULES[m].neutral.items()}), episode(2, 2)
    assert torch.equal(scores(plain, e), scores(neutral, e))
    a, b = loss(plain, e), loss(neutral, e)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('base,m', PAIRS)
def test_module_acts_in_its_phases_only(base, m):
    plain, with_module, e = segmenter(base), segmenter(f'{base}+{m}'), episode(2)
    if acts(m, 'adapt') and not acts(m, 'fit'):                                                    # what is tuned may begin as nothing
        for p in with_module.extras.parameters(): p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    same = torch.equal(scores(plain, e), scores(with_module, e)) and torch.equal(plain(e).mask, with_module(e).mask)
    assert same != acts(m, 'test')
    a, b = sum(loss(plain, e).values()), sum(loss(with_module, e).values())
    assert torch.equal(a, b) != acts(m, 'fit')

@pytest.mark.parametrize('m', sorted(MODULES))
def test_module_declares_what_it_does(m):
    kind = MODULES[m]
    assert kind.seams and set(kind.seams) <= set(SEAMS)
    assert {s for s in SEAMS if callable(getattr(kind, s, None))} == set(kind.seams)
    assert kind.phases and set(kind.phases) <= {'fit', 'adapt', 'test'}
    assert set(kind.neutral) <= {f.name for f in dataclasses.fields(kind.Options)}
    assert kind.__doc__

# ---- options ----------------------------------------------------------------------------------------------------------------
def test_names_and_options():
    names = [*BASES, *MODULES]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch('[a-z][a-z0-9_]*', n) for n in [*names, *ALIASES])          # '+' ends a name in a recipe
    kinds = [r[n].Options for r in (BASES, MODULES) for n in r]
    flat = method_options()
    assert len(flat) == sum(len(dataclasses.fields(k)) for k in kinds)
    fields = dataclasses.fields(TrainSettings)
    assert set(flat) <= {f.name for f in fields} and set(SECTIONS) <= {f.name for f in fields}
    for f in fields: assert len(f.metadata['help']) > 5 and '\n' not in f.metadata['help'], f.name

@pytest.mark.parametrize('alias', sorted(ALIASES))
def test_aliases_are_recipes(alias): assert str(parse_recipe(alias)) == ALIASES[alias]

# ---- masks ------------------------------------------------------------------------------------------------------------------
def test_mask_of_ones_is_the_plain_mean():
    f = torch.randn(2, 3, 7, 9, 9)
    assert torch.allclose(masked_pool(f, torch.ones(2, 3, 65, 65)), f.mean((-2, -1)), atol=1e-6)
    assert torch.equal(masked_pool(f, torch.zeros(2, 3, 65, 65)), torch.zeros(2, 3, 7))

def test_masked_pool_reads_under_the_mask_only():
    f, mask = torch.randn(2, 7, 9, 9), torch.zeros(2, 65, 65)
    mask[:, :30, :40] = 1
    other = torch.where(resize_mask(mask, (9, 9))[:, None] > 0, f, 1e3*torch.randn_like(f))
    assert not torch.equal(f, other) and torch.equal(masked_pool(f, mask), masked_pool(other, mask))

@pytest.mark.parametrize('recipe', RECIPES)
def test_labels_of_ignored_pixels_do_not_matter(recipe):
    seg, e = segmenter(recipe), episode(2, 2)
    other = dataclasses.replace(e, query_mask=e.query_mask ^ e.ignore, support_masks=e.support_masks ^ e.support_ignore)
    assert not torch.equal(e.query_mask, other.query_mask) and not torch.equal(e.support_masks, other.support_masks)
    assert torch.equal(scores(seg, e), scores(seg, other))
    a, b = loss(seg, e), loss(seg, other)
    assert all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('change', ['support empty', 'support full', 'support ignored', 'query empty', 'query full', 'query ignored', 'all empty'])
def test_degenerate_masks_stay_finite(recipe, change):
    seg, e = segmenter(recipe), episode(2, void=False)
    who, what = change.split()
    fill = {'empty': False, 'full': True, 'ignored': True}[what]
    fields = {'support': ['support_masks'], 'query': ['query_mask'], 'all': ['support_masks', 'query_mask']}[who]
    if what == 'ignored': fields = [dict(support='support_ignore', query='ignore')[who]]
    e = dataclasses.replace(e, **{f: torch.full_like(getattr(e, f), fill) for f in fields})
    assert scores(seg, e).isfinite().all()
    total = sum(loss(seg, e).values())
    total.backward()
    assert total.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in seg.parameters())

@pytest.mark.parametrize('n', [1, 3, 1029])
def test_prototype_of_a_large_map_is_that_of_the_masked_form(n):
    g = torch.Generator().manual_seed(0)
    f, chosen = torch.randn(1, 8, n, generator=g), torch.rand(1, n, generator=g) > .5
    chosen[0, 0] = True
    like, unit = likeness(f), torch.nn.functional.normalize(f[0].T.double(), dim=1)
    assert torch.equal(like, like.T) and (like - (2 * unit @ unit.T).exp()).abs().max() < 1e-5
    assert torch.allclose(adaptive_prototype(f, chosen, like), adaptive_prototype(f, chosen), atol=1e-6)

@torch.no_grad()
def test_a_large_map_is_compared_as_a_small_one(monkeypatch):
    seg, e = segmenter('ssp').eval(), episode(1)
    masked = seg(e).scores
    monkeypatch.setattr('cdfss.models.ssp.LARGE_MAP', 4)
    assert 0 < (seg(e).scores - masked).abs().max() < 1e-4

def test_masks_leave_ignored_pixels_out_of_both():
    e = episode(1, 2)
    fg, bg = Match.masks(e.support_masks, e.support_ignore)
    assert torch.equal(fg + bg, (~e.support_ignore).float())

# ---- registry and recipes ---------------------------------------------------------------------------------------------------
def test_registry_refuses_a_second_thing_of_a_name():
    r = Registry('thing')
    r.register('a')(1)
    with pytest.raises(InputError, match="thing 'a' is registered already"): r.register('a')(2)
    for registry, name in ((BASES, 'ssp'), (MODULES, 'lem')):
        was = registry[name]
        with pytest.raises(InputError, match=f"'{name}' is registered already"): registry.register(name)(type('Other', (), {}))
        assert registry[name] is was

DROPPED = '''
from dataclasses import dataclass
from cdfss.basics import Options, option
from cdfss.methods.seams import MODULES, Module

@dataclass(frozen=True)
class ShiftOptions(Options):
    by:float = option(1.0, "added to the foreground score")

@MODULES.register('shift')
class Shift(Module):
    "Moves the threshold."
    seams, phases, neutral, Options = ('scores',), ('test',), {'by': 0.0}, ShiftOptions
    def scores(self, coarse, match):
        coarse = coarse.clone()
        coarse[:, 1] += self.options.by
        return coarse
'''

def test_a_module_dropped_in_is_found(tmp_path, monkeypatch):
    import cdfss.methods
    (tmp_path/'shift.py').write_text(DROPPED)
    monkeypatch.setattr(cdfss.methods, '__path__', [*cdfss.methods.__path__, str(tmp_path)])
    try:
        discover()
        assert 'shift' in MODULES and method_options()['shift_by'].default == 1.0
        e = episode(2)
        moved, plain = segmenter('ssp+shift', {'shift_by': 3}), segmenter('ssp')
        with torch.no_grad(): a, b = moved(e), plain(e)
        assert torch.allclose(a.coarse[:, 1], b.coarse[:, 1] + 3) and torch.equal(a.coarse[:, 0], b.coarse[:, 0])
        with pytest.raises(InputError, match="'shift' is a module and needs a base before it, e.g. ssp\\+shift"): parse_recipe('shift')
    finally:
        MODULES.pop('shift', None)
        sys.modules.pop('cdfss.methods.shift', None)

@pytest.mark.parametrize('text,reason', [
    ('', "a name is missing"), ('ssp+', "a name is missing"), ('ssp++lem', "a name is missing"),
    ('sspp', "unknown method 'sspp': did you mean 'ssp'"), ('ssp+lme', "unknown module 'lme': did you mean 'lem'"),
    ('ssp+ssp', "'ssp' is a base"), ('ssp+prototype', "'prototype' is a base"), ('lem+prototype', "'prototype' is a base"),
    ('ssp+lem+lem', "'lem' occurs twice"), ('loec+lcm', "'lcm' occurs twice"), ('lem+lem', "'lem' occurs twice")])
def test_impossible_recipes(text, reason):
    with pytest.raises(InputError, match=reason) as e: parse_recipe(text)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('values,reason', [
    ({'lcm_bta': 1}, "unknown parameter 'lcm_bta': did you mean 'lcm_beta'"), ({'lcm_stage': 'stage9'}, "stage for LCM 'stage9'"),
    ({'lcm_stage': 'stage4'}, "choose from stage1, stage2, stage3, stem"), ({'lem_where': 'stage4'}, "stage for LEM 'stage4'"),
    ({'lem_p': 2}, "lem_p=2: expected at most 1"), ({'lcm_k': 0}, "lcm_k=0: expected at least 1"), ({'lem_branch': 'none'}, "value of lem_branch 'none'"),
    ({'ssp_refine': 'yes'}, "ssp_refine='yes' is str, expected bool")])
def test_impossible_options(values, reason):
    with pytest.raises(InputError, match=reason) as e: build('loec', backbone(), values)
    assert '\n' not in str(e.value)

def test_a_module_with_a_seam_that_does_not_exist_is_refused():
    MODULES.register('wrong')(type('Wrong', (Module,), dict(seams=('scroes',), phases=('test',))))
    try:
        with pytest.raises(InputError, match="module 'wrong' names the seam 'scroes'"): build('ssp+wrong', backbone())
    finally: del MODULES['wrong']
