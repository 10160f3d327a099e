"Adaptation: many tasks at once equal one by one and a plain loop, the start is the same to the bit, and nothing but the supports is read."
import copy, dataclasses
import pandas as pd
import pytest, torch
from cdfss.basics import InputError
from cdfss.data.guard import Ledger
from cdfss.data.images import ImageStore, collate
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.engine import adapt
from cdfss.engine.adapt import AdaptOptions, Tuner, adapting, answer, pick, read_supports, tune, with_parameters
from cdfss.engine.evaluate import FeatureStore, evaluate, predict
from cdfss.engine.metrics import COUNTS
from cdfss.engine.train import RunData, TrainSettings, beside, open_run, resolve
from cdfss.episode import Episode
from cdfss.methods.seams import build
from cdfss.models.segmenter import Tuning
from cdfss.models.ssp import SSP
from episodes import backbone, episode, segmenter

pytestmark = pytest.mark.usefixtures('one_thread')
PLAN = Tuning('adam', 3, .05)

def supports(e):
    "A made-up episode as the engine passes it on: the supports alone."
    return Episode(e.support[:, 0], e.support, e.support_masks, support_ignore=e.support_ignore, ids=[(f'task{i}',) for i in range(len(e))])

def same(a, b, atol): return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=atol) for n in a)

def moved(seg, values):
    "How far tuning moved the parameters of each task: the largest change of any."
    start = dict(seg.named_parameters())
    return torch.stack([(v - start[n].detach()).abs().flatten(1).amax(1) for n, v in values.items()]).amax(0)

# ---- tuning -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('recipe,k', [('ssp+apm_m+acpa', 1), ('ssp+apm_s', 3), ('prototype+apm_s', 2), ('hsnet+apm_m+acpa', 1), ('patnet', 1)])
def test_a_batch_of_tasks_is_each_of_them_alone(recipe, k):
    shallow = {f'{m}_where': 'stage2' for m in ('apm_m', 'acpa')} if recipe.startswith('hsnet') else {}   # at 48 pixels the deepest map has four cells
    seg, e = segmenter(recipe, shallow), supports(episode(3, k, 48))
    before = {n: v.clone() for n, v in seg.state_dict().items()}
    plan = Tuning('sgd', 3, 500.) if recipe.startswith('hsnet') else PLAN                                  # gradients of 1e-5 and less: Adam makes whole steps of their rounding
    values, losses = tune(seg, e, plan)
    assert set(values) == set(seg.adaptable()) and losses.shape == (3, 3) and all(v.shape[0] == 3 and not v.requires_grad for v in values.values())
    for i in range(3):
        alone, l = tune(seg, pick(e, i), plan)
        assert same({n: v[i:i + 1] for n, v in values.items()}, alone, 2e-3) and torch.allclose(losses[:, i:i + 1], l, atol=1e-3)
    assert all(torch.equal(v, before[n]) for n, v in seg.state_dict().items()) and seg.phase == 'test'
    assert any(not torch.allclose(v[0], v[1], atol=.01) for v in values.values()) and moved(seg, values).min() > .02

@pytest.mark.parametrize('recipe,k,plan', [('ssp+apm_s', 2, PLAN), ('ssp+apm_s', 2, Tuning('sgd', 3, .05, momentum=.9, weight_decay=.01)), ('patnet', 1, Tuning('sgd', 3, .05)), ('hsnet+apm_s', 3, Tuning('sgd', 3, 500.))])
def test_tuning_is_the_plain_loop(recipe, k, plan):
    "A copy of the segmenter per task, its own parameters, torch's optimizer."
    seg, e = segmenter(recipe, {'apm_s_where': 'stage2'} if recipe == 'hsnet+apm_s' else None), supports(episode(2, k, 48))
    values, _ = tune(seg, e, plan)
    assert moved(seg, values).min() > .01                                               # a hundred times the tolerance below
    for i in range(2):
        own = copy.deepcopy(seg)
        tuned = {n: p.requires_grad_() for n, p in own.named_parameters() if n in own.adaptable()}
        optimizer = adapt.OPTIMIZERS[plan.optimizer](list(tuned.values()), plan)
        with adapting(own):
            for own.turn in range(plan.steps):                                          # the support that a costly base is shown
                optimizer.zero_grad()
                sum(own.adapt_loss(pick(e, i)).values()).backward()
                optimizer.step()
        assert same({n: v[i] for n, v in values.items()}, {n: p.detach() for n, p in tuned.items()}, 1e-4)

def test_every_task_starts_from_the_same_bits():
    seg, a, b = segmenter('ssp+apm_m+acpa'), supports(episode(2, seed=0)), supports(episode(2, seed=1))
    fresh, _ = tune(seg, b, PLAN)
    tune(seg, a, PLAN)
    again, _ = tune(seg, b, PLAN)
    assert all(torch.equal(fresh[n], again[n]) for n in fresh)
    still, losses = tune(seg, a, dataclasses.replace(PLAN, steps=0))
    start = dict(seg.named_parameters())
    assert losses.shape == (0, 2) and all(torch.equal(v[1], start[n]) for n, v in still.items())

def test_order_of_tasks_does_not_matter():
    seg, e = segmenter('ssp+apm_m'), supports(episode(4, 1, 48))
    turned = dataclasses.replace(e, **{f.name: v.flip(0) for f in dataclasses.fields(e) if isinstance(v := getattr(e, f.name), torch.Tensor)}, ids=e.ids[::-1])
    a, b = tune(seg, e, PLAN)[0], tune(seg, turned, PLAN)[0]
    assert same(a, {n: v.flip(0) for n, v in b.items()}, 1e-5)

def test_all_supports_are_used():
    seg, e = segmenter('ssp+apm_s'), supports(episode(1, 3))
    values, _ = tune(seg, e, PLAN)
    for i in range(3):
        other = dataclasses.replace(e, support_masks=e.support_masks.clone())
        other.support_masks[:, i] ^= True
        assert not same(values, tune(seg, other, PLAN)[0], 1e-4), i

def test_a_costly_base_is_shown_one_support_at_a_time():
    seg, e = segmenter('hsnet+apm_s'), supports(episode(1, 3))
    seen = []
    for seg.turn in range(3):
        with torch.no_grad(): match, target = seg.rehearse(e)
        name = seg.reads[0]
        assert match.support[name].shape[:2] == (3, 1) and len(target) == 3
        seen.append([next(j for j in range(3) if torch.equal(match.support[name][i, 0], match.query[name][j])) for i in range(3)])
    assert seen == [[1, 0, 0], [2, 2, 1], [1, 0, 0]]

def test_given_stages_are_what_would_be_encoded():
    seg, e = segmenter('ssp+apm_s'), supports(episode(2, 2))
    with torch.no_grad(): stages = {n: f.unflatten(0, (2, 2)) for n, f in seg.encode(e.support.flatten(0, 1), queries=0).items()}
    assert same(tune(seg, e, PLAN)[0], tune(seg, e, PLAN, stages)[0], 1e-6)

@pytest.mark.parametrize('recipe,k,levels', [('hsnet+apm_s', 1, 2), ('hsnet+apm_m+acpa', 3, 2), ('patnet', 2, 2), ('patnet+acpa', 3, 1)])
def test_levels_that_stay_are_squeezed_once(recipe, k, levels, monkeypatch):
    seg, e, counted = segmenter(recipe), supports(episode(2, k, 96, seed=3)), []        # objects that are seen on the deepest map, of nine cells
    squeezed = type(seg.learner).squeezed
    monkeypatch.setattr(type(seg.learner), 'squeezed', lambda self, i, *level: counted.append(i) or squeezed(self, i, *level))
    plan = Tuning('sgd', 4, 500. if recipe.startswith('hsnet') else .05)                # Adam makes whole steps of rounding where a gradient is zero
    values, losses = tune(seg, e, plan)
    assert len(counted) == levels*2*k + (3 - levels)*plan.steps                         # once a support of each of two tasks
    monkeypatch.setattr(type(seg), 'hold', lambda self, episode, stages: {})
    plain, plain_losses = tune(seg, e, plan)
    assert torch.allclose(losses, plain_losses, atol=1e-4) and same(values, plain, 1e-3) and moved(seg, values).min() > .01
    assert all(p.grad is None for p in seg.parameters())                              # nothing but the tuned copies has a gradient

def test_a_loss_that_is_not_finite_names_the_rate():
    seg, e = segmenter('ssp+acpa'), supports(episode(2))
    stages = {'stage3': torch.randn(2, 1, 128, 9, 9)}
    stages['stage3'][1, 0, 5, 4, 4] = torch.nan
    with pytest.raises(InputError, match='adapt_lr=0.05: the loss of tuning is not finite at step 0; lower adapt_lr') as err: tune(seg, e, PLAN, stages)
    assert '\n' not in str(err.value) and seg.phase == 'test'

class Whole(SSP):
    "Tunes its last backbone stage on a random half of the pixels."
    tuning = Tuning('sgd', 2, .01)
    def adaptable(self): return [n for n, _ in self.named_parameters() if n.startswith('backbone.stages.stage3') and 'conv' in n]
    def adapt_loss(self, episode, stages=None):
        assert stages is None
        hidden = torch.rand(episode.support_masks.shape) < .5
        return super().adapt_loss(dataclasses.replace(episode, support_ignore=episode.support_ignore | hidden))

def test_tuning_the_backbone_is_seeded_by_the_task():
    seg, e = Whole(backbone()).eval(), supports(episode(3, 2, 48))
    assert seg.tunes_backbone and not seg.shares_encoding
    before = {n: v.clone() for n, v in seg.state_dict().items()}
    torch.manual_seed(1)
    values, losses = tune(seg, e, seg.tuning)
    torch.manual_seed(2)
    alone, _ = tune(seg, pick(e, 2), seg.tuning)
    assert losses.shape == (2, 3) and all(torch.equal(values[n][2:], alone[n]) for n in values)
    other, _ = tune(seg, dataclasses.replace(pick(e, 2), ids=[('another',)]), seg.tuning)
    assert any(not torch.equal(other[n], alone[n]) for n in alone)
    assert all(torch.equal(v, before[n]) for n, v in seg.state_dict().items())
    with torch.no_grad():
        asked = episode(3, 2, 48)
        tuned = torch.cat([p.scores for p in answer(seg, values, asked, (48, 48))])
    assert not torch.allclose(tuned, seg(asked).scores, atol=1e-4)

# ---- options ----------------------------------------------------------------------------------------------------------------
def test_numbers_are_the_papers_unless_given():
    paper = Tuning('adam', 60, 1e-2, {'chest': .1})
    plan = lambda **o: AdaptOptions(**o).plan(paper, 'chest')
    assert (plan().lr, plan(adapt_lr=0).lr, plan(adapt_lr=.5).lr, AdaptOptions().plan(paper, 'isic').lr) == (.1, 0, .5, .01)
    assert (plan().steps, plan(adapt_steps=0).steps, plan(adapt_optimizer='sgd').optimizer, plan().optimizer) == (60, 0, 'sgd', 'adam')
    assert segmenter('ssp+apm_s').tuning.rates['chest'] == .1 and segmenter('ssp').tuning is None and segmenter('patnet').tuning.steps == 10

def test_the_hash_knows_adaptation_only_where_there_is_any(monkeypatch):
    monkeypatch.setattr('cdfss.engine.train.file_hash', lambda p: 'weights')
    data = object.__new__(RunData)
    data.fingerprints, data.manifests = {}, {}
    name = lambda method, **o: open_run(resolve(TrainSettings(method=method, test_episodes=5, **o)), data).path.name
    assert name('ssp') == name('ssp', adapt_steps=7) == name('ssp', adapt_lr=.5)
    assert name('ssp+apm_s') != name('ssp+apm_s', adapt_steps=7) and name('ssp+apm_s') == name('ssp+apm_s', adapt_batch=3)
    said = {m: beside(TrainSettings(method=m)) for m in ('ssp', 'lcm', 'ssp+apm_s', 'ssp+lem+apm_s+lcm', 'patnet')}
    assert said == {'ssp': None, 'lcm': 'ssp', 'ssp+apm_s': 'ssp', 'ssp+lem+apm_s+lcm': 'ssp+lem', 'patnet': 'patnet, untuned'}

# ---- what is read -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('decoded')

@pytest.fixture(scope='module')
def store(miniature, cache): return ImageStore(open_dataset('isic', miniature), 64, cache=cache)

@pytest.fixture(scope='module')
def manifests(store): return {k: draw('patnet', store.dataset, k, 0, 6) for k in (1, 3)}

QUICK = AdaptOptions(adapt_steps=2, adapt_lr=.1)

@pytest.mark.parametrize('features', [False, True])
@pytest.mark.parametrize('k', [1, 3])
def test_only_supports_are_read(store, manifests, monkeypatch, k, features):
    seg, episodes, read = segmenter('ssp+apm_s'), manifests[k].episodes[:3], []
    for name in ('image', 'mask'):
        was = getattr(ImageStore, name)
        monkeypatch.setattr(ImageStore, name, lambda self, i, was=was: read.append(i) or was(self, i))
    tuner = Tuner(QUICK)
    tuner(seg, store, episodes, FeatureStore(seg, store, ('stage3',)) if features else None)
    assert set(read) == {p for _, s, _ in episodes for p in s} and tuner.ledger.used == 3 and not tuner.ledger.breaches

def planted(monkeypatch, position):
    was = adapt.read_supports
    monkeypatch.setattr(adapt, 'read_supports', lambda store, positions, *a: was(store, [(*positions[0][:-1], position)], *a))

def test_another_image_is_refused(store, manifests, monkeypatch):
    seg, episodes = segmenter('ssp+apm_s'), manifests[1].episodes[:1]
    query = episodes[0][0]
    planted(monkeypatch, query)
    with pytest.raises(InputError, match='not among the 1 supports of the episode') as e: Tuner(QUICK)(seg, store, episodes)
    assert store.dataset.items[query].id in str(e.value) and '\n' not in str(e.value)
    off = Ledger(on=False)
    Tuner(QUICK, off)(seg, store, episodes)
    assert len(off.record['leaks']) == 1 and store.dataset.items[query].id in off.record['leaks'][0]

def test_reading_outside_an_episode_is_refused(store):
    with pytest.raises(InputError, match='outside any episode'): read_supports(store, [(0,)], Ledger(), segmenter('ssp+apm_s'))

# ---- evaluation -------------------------------------------------------------------------------------------------------------
def rows(frame): return frame.drop(columns='seconds').sort_values(['method', 'index'], ignore_index=True)

@pytest.mark.parametrize('k', [1, 3])
def test_evaluation_answers_with_each_tasks_parameters(store, manifests, k):
    methods = {r: build(r, backbone()).eval() for r in ('ssp+apm_m', 'ssp')}
    frame = evaluate(methods, store, manifests[k], epoch=0, tuner=Tuner(QUICK), batch=3)
    untuned = evaluate(methods, store, manifests[k], epoch=0, tuner=Tuner(AdaptOptions(adapt_steps=0)))
    of = lambda f, m: f[f.method == m][list(COUNTS)].reset_index(drop=True)
    assert of(untuned, 'ssp+apm_m').equals(of(untuned, 'ssp')) and of(frame, 'ssp').equals(of(untuned, 'ssp'))
    assert not of(frame, 'ssp+apm_m').equals(of(frame, 'ssp'))
    seg, tuner = methods['ssp+apm_m'], Tuner(QUICK)
    for i, e in enumerate(manifests[k].episodes[:3]):
        values = tuner(seg, store, [e])
        with torch.no_grad():
            batch = collate(store, [e], seg.backbone.mean, seg.backbone.std)
            mask = with_parameters(seg, {n: v[0] for n, v in values.items()}, 'forward', batch).mask
        tp = int((mask & batch.query_mask).sum())
        assert abs(tp - of(frame, 'ssp+apm_m').tp[i]) <= 4                                          # pixels on the edge may turn with the last digit

def test_evaluation_goes_on_where_it_stopped(store, manifests, tmp_path, monkeypatch):
    methods = {'ssp+apm_s': segmenter('ssp+apm_s')}
    whole = evaluate(methods, store, manifests[1], epoch=0, tuner=Tuner(QUICK), batch=2, block=2)
    calls = []
    def stop(*a, **k):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return predict(*a, **k)
    monkeypatch.setattr('cdfss.engine.evaluate.predict', stop)
    with pytest.raises(KeyboardInterrupt): evaluate(methods, store, manifests[1], epoch=0, tuner=Tuner(QUICK), batch=2, block=2, parts=tmp_path)
    frame = evaluate(methods, store, manifests[1], epoch=0, tuner=Tuner(QUICK), batch=2, block=2, parts=tmp_path)
    assert len(calls) == 4
    pd.testing.assert_frame_equal(rows(frame), rows(whole))

def test_a_method_that_tunes_its_backbone_is_evaluated(store, manifests):
    seg = Whole(backbone()).eval()
    frame = evaluate({'whole': seg, 'ssp': build('ssp', seg.backbone).eval()}, store, manifests[1], epoch=0, tuner=Tuner(AdaptOptions(adapt_lr=.3)), batch=2)
    counts = {m: f[list(COUNTS)].reset_index(drop=True) for m, f in frame.groupby('method')}
    assert len(frame) == 12 and not counts['whole'].equals(counts['ssp'])

# ---- kept state -------------------------------------------------------------------------------------------------------------
def test_tuned_parameters_are_kept_and_used_again(store, manifests, tmp_path, monkeypatch):
    seg, episodes = segmenter('ssp+apm_s'), manifests[1].episodes
    tuner = Tuner(QUICK, keep=tmp_path)
    first = tuner(seg, store, episodes[:2])
    assert len(list(tmp_path.iterdir())) == 1
    with monkeypatch.context() as m:
        m.setattr(adapt, 'tune', lambda *a: pytest.fail('tuned again'))
        again = tuner(seg, store, episodes[:2])
    assert all(torch.equal(first[n], again[n]) for n in first)
    tuner(seg, store, episodes[2:4])                                                                # other tasks
    Tuner(AdaptOptions(adapt_steps=3, adapt_lr=.1), keep=tmp_path)(seg, store, episodes[:2])        # another plan
    Tuner(QUICK, keep=tmp_path)(segmenter('ssp+apm_s', seed=1), store, episodes[:2])                # other weights
    Tuner(QUICK, keep=tmp_path)(segmenter('ssp+apm_s', {'apm_s_strength': .5}), store, episodes[:2])
    assert len(list(tmp_path.iterdir())) == 5
