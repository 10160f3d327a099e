"SCCAN, HDMNet and PAHNet against numbers computed with their authors' own code."
import json, re, zlib
from dataclasses import replace
import numpy as np
import pytest, torch
import torch.nn.functional as F
from parity_tools import close, fill, images, load, official_state
from cdfss.episode import Episode
from cdfss.methods.pahnet import MIXERS, Enhancement, Gate
from cdfss.models.affinity import Attention, resize
from cdfss.models.hdmnet import Hierarchy
from cdfss.models.importers import HDMNET_RULES, from_official, levels_of
from cdfss.models.sccan import Block, best_windows, dice, mask_prior, windows

pytestmark = pytest.mark.usefixtures('one_thread')

def renamed(key, rules):
    for pattern, new in rules: key = re.sub(pattern, new, key)
    return key

def section(folder, case, name):
    "The tensors of one module of a case, and the case's arrays and entry."
    arrays, entry = load(folder, case)
    keys = json.loads((folder/f'{case}.keys.json').read_text())[name]
    return {k: fill(k, shape, entry['weight_rule']['gains']) for k, (shape, _) in keys.items()}, arrays, entry['recommended_atol']

def below(state, prefix): return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
def tokens(x): return x.flatten(2).mT

# ---- SCCAN's block, plain and with PFE and ASC ---------------------------------------------------------------------------------
def asked(a, guide=None):
    q, s = (tokens(torch.from_numpy(a[n]).float()/16) for n in ('q_i8', 's_i8'))
    return Attention(0, q, s, torch.from_numpy(a['s_mask']).flatten(1), (16, 12), guide)

@pytest.mark.parametrize('shift', [0, 2])
@torch.no_grad()
def test_sccan_block(cases, shift):
    state, a, tol = section(cases('sccan_block'), 'sccan_block', f'block_shift{shift}')
    block, before = Block(32, 4, 4, shift), asked(a)
    block.load_state_dict(state)
    cut = lambda x: windows(F.pad(x.unflatten(1, (16, 12)), (0, 0, *[shift]*4)), 4)
    at = best_windows(cut(block.norm1(before.query)), cut(block.norm1(before.support)), cut(before.fg[..., None])[..., 0])
    assert torch.equal(at, torch.from_numpy(a[f'shift{shift}_window_index']))
    for name, got in zip('qs', block(before)): close(got, a[f'shift{shift}_{name}_out'], tol, name)

@torch.no_grad()
def test_sccan_prior_and_loss(cases):
    a, entry = load(cases('sccan_block'), 'sccan_block')
    q, s = (torch.from_numpy(a[f'prior_{n}_i8']).float()/16 for n in ('query', 'support'))
    close(resize(mask_prior(q, s, torch.from_numpy(a['prior_support_mask'])[:, 0])[:, None], (16, 16)), a['prior_mask'], entry['recommended_atol'], 'prior')
    close(dice(torch.from_numpy(a['dice_pred']), torch.from_numpy(a['dice_target']).long())[None], a['dice_loss'], entry['recommended_atol'], 'dice')

def enhancement(state, dim):
    net = Enhancement(dim)
    net.load_state_dict({renamed(k, MIXERS): v for k, v in state.items()})
    return net

@torch.no_grad()
def test_enhancement(cases):
    state, a, tol = section(cases('pahnet_sccan_block'), 'pahnet_sccan_block', 'adaptor')
    q, s, pseudo = enhancement(state, 32)(asked(a, torch.from_numpy(a['pro_prob']).flatten(1)))
    for name, got in dict(q_out=q, s_out=s, pseudo_mask=pseudo.unflatten(2, (16, 12))).items(): close(got, a[f'adaptor_{name}'], tol, name)

@pytest.mark.parametrize('shift', [0, 2])
@torch.no_grad()
def test_pahnet_block_of_sccan(cases, shift):
    state, a, tol = section(cases('pahnet_sccan_block'), 'pahnet_sccan_block', f'block_shift{shift}')
    block, gate, before = Block(32, 4, 4, shift), Gate(32, 4, True), asked(a, torch.from_numpy(a['pro_prob']).flatten(1))
    gate.load_state_dict({k.replace('proj_q', 'query').replace('proj_s', 'support'): v for k, v in below(state, 'attn_q.').items() if k.startswith('proj_')})
    block.load_state_dict({k: v for k, v in state.items() if not re.search(r'^pe\.|proj_[qs]', k)})
    q, s, pseudo = enhancement(below(state, 'pe.'), 32)(before)
    close(pseudo.unflatten(2, (16, 12)), a[f'shift{shift}_pseudo_mask'], tol, 'pseudo mask')
    for name, got in zip('qs', block(replace(before, query=q, support=s, gate=gate))): close(got, a[f'shift{shift}_{name}_out'], tol, name)

# ---- HDMNet's pyramid, plain and with PFE and ASC ------------------------------------------------------------------------------
@pytest.mark.parametrize('case', ['hdmnet_block', 'pahnet_hdmnet_block'])
@pytest.mark.parametrize('k', [1, 2])
@torch.no_grad()
def test_hierarchy(cases, case, k):
    guided = case.startswith('pahnet')
    state, a, tol = section(cases(case), case, 'transformer')
    state = below({renamed('transformer.' + n, [*HDMNET_RULES, *levels_of(guided)]): v for n, v in state.items()}, 'hierarchy.')
    net = Hierarchy().eval()
    net.load_state_dict({n: v for n, v in state.items() if n and not n.startswith(('pfe.', 'asc.'))})
    enhance, gates = [torch.nn.ModuleList(make() for _ in range(3)) for make in (lambda: Enhancement(64), lambda: Gate(64, 1, False))]
    if guided:
        enhance.load_state_dict({renamed(n, MIXERS): v for n, v in below(state, 'pfe.').items()})
        gates.load_state_dict(below(state, 'asc.'))
    def attended(x):
        if not guided: return x
        x = replace(x, gate=gates[x.level])
        if x.own: return x
        q, s, pseudo = enhance[x.level](x)
        return replace(x, query=q, support=s, pseudo=(*x.pseudo, pseudo.unflatten(2, x.size)))
    got, f = {}, lambda n: torch.from_numpy(a[f's{k}_{n}'])
    def first(m, i, o): got.setdefault('first_self_attention', o[..., ::4])
    net.down[0].layers[0].register_forward_hook(first)
    for i in range(3): net.match[i].register_forward_hook(lambda m, _, o, i=i: got.update({f'match{i}': o[0][..., ::4]}))
    shots = lambda x: x.unflatten(0, (-1, k))
    out, maps, pseudo = net(f('q_i8').float()/16, shots(f('s_i8').float()/16), shots(f('mask').float())[:, :, 0], f('similarity'), attended, f('pro_prob') if guided else None)
    got |= {f'weight{i}': m for i, m in enumerate(maps)} | {f'pseudo_mask{i}': m for i, m in enumerate(pseudo)} | {'out': out}
    for name, value in got.items(): close(value, f(name), tol, name)

# ---- whole methods -----------------------------------------------------------------------------------------------------------
def whole(folder, case, k):
    "Arrays, tolerance, official tensors and the episode of one of the full cases."
    a, entry = load(folder, case)
    state = {n: v for n, v in official_state(folder, case).items() if not n.startswith('kshot_rw') or k == 5}
    for n in ('gram_merge.weight', 'cls_merge.weight'):
        if n in state: state[n] = (torch.tensor([1., 0.]).view(1, 2, 1, 1) + .2*torch.from_numpy(np.random.default_rng(zlib.crc32(n.encode())).standard_normal((1, 2, 1, 1)))).float()
    with np.load(folder/'transformer_inputs.npz') as z: x, masks = images(z['images_u8']), torch.from_numpy(z['masks'])
    b = 2 if k == 1 else 1
    x, masks = x[:b, :k + 1], masks[:b, :k + 1]
    e = Episode(x[:, 0], x[:, 1:], masks[:, 1:] == 1, query_mask=masks[:, 0] == 1, ignore=masks[:, 0] == 255, support_ignore=masks[:, 1:] == 255, cls=torch.tensor([3, 9])[:b])
    return a, entry['recommended_atol'], state, e

def stages_of(seg, e): return seg.encode(torch.cat([e.query, e.support.flatten(0, 1)]), queries=len(e.query)) if seg.shares_encoding or seg.plus else None

def losses(seg, e, stages):
    "Loss terms in training, without dropout; frozen stages are taken as they are known."
    seg.train()
    for m in seg.modules():
        if isinstance(m, (torch.nn.Dropout, torch.nn.Dropout2d)): m.eval()
    return seg.loss(e, stages)

def every(x): return x[..., ::2, ::2]
def places(x): return x.mT.unflatten(2, (64, 64))

def read_sccan(seg, e, stages, k):
    "What goes into SCCAN's first block (before PFE) and comes out of the last, and its answers, as the reference arrays have them."
    got, attended = {}, seg.attended
    def first(a):
        if a.level == 0: got.update(query_in=places(a.query)[:, ::16, ::4, ::4], supp_mask=every(a.fg.unflatten(1, (64, 64))[:, None]))
        return attended(a)
    seg.attended = first
    seg.norm.register_forward_hook(lambda m, i, o: got.update(swin_out=places(o)[:, ::16, ::4, ::4]))
    out = seg.compare(seg.match(e, stages))
    seg.attended = attended
    if seg.plus: got |= {f'pseudo_mask_{n}': every(out['pseudo'][i]) for n, i in (('first', 0), ('last', -1))}
    whole, step = {n: resize(out[key], (97, 97)) for n, key in (('meta', 'meta'), ('final', 'scores'))}, 2 if k == 1 else 4
    if seg.base is None: return got | {'logits': every(whole['final'])}
    return got | dict(base=out['base'][..., ::8, ::8], meta=whole['meta'][..., ::step, ::step], final=every(whole['final']))

@pytest.mark.parametrize('k', [1, 5])
@torch.no_grad()
def test_sccan(cases, k):
    a, tol, state, e = whole(cases('sccan_full'), 'sccan_full', k)
    seg = from_official('sccan', {n: v for n, v in state.items() if not n.startswith('kshot_rw')})
    stages = stages_of(seg, e)
    for n, v in read_sccan(seg, e, stages, k).items(): close(v, a[f'k{k}_{n}'], tol, n)
    close(losses(seg, e, stages)['meta'], a[f'k{k}_losses'][0], tol, 'loss')

@pytest.mark.parametrize('k', [1, 5])
@torch.no_grad()
def test_pahnet_on_sccan(cases, k):
    a, tol, state, e = whole(cases('pahnet_sccan_full'), 'pahnet_sccan_full', k)
    seg = from_official('sccan+pfe+asc', state)
    stages = stages_of(seg, e)
    for n, v in read_sccan(seg, e, stages, k).items(): close(v, a[f'k{k}_{n}'], tol, n)
    terms = losses(seg, e, stages)
    close(torch.stack([terms[n] for n in ('final', 'meta', 'pseudo')]), a[f'k{k}_losses'], tol, 'losses')

@pytest.mark.parametrize('k', [1, 5])
@pytest.mark.parametrize('case', ['hdmnet_full', 'pahnet_hdmnet_full'])
@torch.no_grad()
def test_hdmnet(cases, case, k):
    guided, folder = case.startswith('pahnet'), cases(case)
    a, tol, state, e = whole(folder, case, k)
    seg, got = from_official('hdmnet+pfe+asc' if guided else 'hdmnet', state), {}
    seg.hierarchy.register_forward_hook(lambda m, i, o: got.update({'similarity': i[3], 'query_in': i[0][:, ::4], 'transformer_out': o[0]} | {f'weight{n}': w for n, w in enumerate(o[1])}))
    stages = stages_of(seg, e)
    match = seg.match(e, stages)
    out = seg.compare(match)
    if guided:
        got |= {f'pseudo_mask_{n}': every(out['pseudo'][i]) for n, i in (('first', 0), ('last', -1))}
        prob = torch.stack([1 - match.guide, match.guide], 1)
        got['prototype_prob'] = every(prob) if k == 1 else prob
    full = {n: resize(out[n], (97, 97)) for n in ('base', 'meta', 'scores')}
    for n, name, step in (('base', 'base', 8), ('meta', 'meta', 2 if k == 1 else 4), ('final', 'scores', 2)): got[n] = full[name][..., ::step, ::step]
    for n, v in got.items(): close(v, a[f'k{k}_{n}'], tol, n)
    terms = losses(seg, e, stages)
    with np.load(folder/'transformer_inputs.npz') as z: known = F.cross_entropy(full['base'], torch.from_numpy(z['base_map'][:len(e.cls)]).long(), ignore_index=255)
    close(torch.stack([terms['final'] + terms['meta'], terms['distillation'], known + terms.get('pseudo', 0)]), a[f'k{k}_losses'], tol, 'losses')
