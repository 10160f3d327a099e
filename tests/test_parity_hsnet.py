"HSNet and PATNet against numbers computed with their authors' own code."
import numpy as np
import pytest, torch
import torch.nn.functional as F
from parity_tools import close, images, load, official_state
from cdfss.episode import Episode
from cdfss.models.hsnet import HPN, hypercorrelation, vote
from cdfss.models.importers import from_official
from cdfss.models.patnet import divergence, dual, pooled, project, rows
from cdfss.models.prototype import resize_mask
from cdfss.models.segmenter import Match

def bits(packed, width): return torch.from_numpy(np.unpackbits(packed, axis=-1)[..., :width]).bool()
def enlarged(a, times): return a.repeat(times, -1).repeat(times, -2)

def episode(a, shots, times):
    t = lambda n: torch.from_numpy(enlarged(a[n], times))
    return Episode(query=images(t('query_u8').numpy()), support=images(t('support_u8').numpy())[:, shots], support_masks=t('support_mask')[:, shots] == 1,
                   query_mask=t('query_mask') == 1)

FULL = [('hsnet', 'hsnet_full_small', 2), ('patnet', 'patnet_full_small', 2), ('hsnet', 'hsnet_full_400', 4)]

@pytest.mark.parametrize('method,name,times', FULL)
@torch.no_grad()
def test_whole_method(cases, method, name, times):
    folder = cases(name)
    a, entry = load(folder, name)
    seg, tol, size = from_official(method, official_state(folder, name)), entry['recommended_atol'], a['query_u8'].shape[-1]*times
    match = seg.match(episode(a, slice(0, 5), times))
    for i, n in enumerate(seg.reads):
        if f'feat_q_{i}' in a: close(match.query[n][:, ::64], a[f'feat_q_{i}'], tol, f'feature {n}')
    alone = [seg.decide(Match(match.query, {n: f[:, [i]] for n, f in match.support.items()}, match.fg[:, [i]], match.bg[:, [i]]), (size, size)) for i in range(5)]
    close(alone[0].scores[..., ::4, ::4], a['logits_shot0'], tol, 'scores of the first support')
    close(torch.stack([p.scores[..., ::16, ::16] for p in alone[1:]], 1), a['logits_shot1to4'], tol, 'scores of the others')
    sure = lambda ps: torch.stack([(p.scores[:, 1] - p.scores[:, 0]).abs() for p in ps], 1).amin(1) > 2*tol            # elsewhere rounding decides a vote
    for shots, key in (([0], 'pred_1shot_bits'), ([2, 3], 'pred_2shot_bits'), ([0, 1, 2, 3, 4], 'pred_5shot_bits')):
        if key not in a: continue
        some = Match(match.query, {n: f[:, shots] for n, f in match.support.items()}, match.fg[:, shots], match.bg[:, shots])
        mask, want = seg.decide(some, (size, size)).mask, bits(a[key], size)
        assert torch.equal(vote(torch.stack([alone[i].mask for i in shots], 1)), mask)
        clear = sure([alone[i] for i in shots])
        assert clear.float().mean() > .99 and torch.equal(mask[clear], want[clear]), key

def test_learner(cases):
    folder = cases('hsnet_learner')
    a, entry = load(folder, 'hsnet_learner')
    tol, f32 = entry['recommended_atol'], lambda n: torch.from_numpy(a[n]).float().transpose(0, 1)/16
    net = HPN((3, 6, 4))
    state = official_state(folder, 'hsnet_learner')
    heads = {'encoder_layer4.': 'squeeze.0.', 'encoder_layer3.': 'squeeze.1.', 'encoder_layer2.': 'squeeze.2.', 'encoder_layer4to3.': 'mix.0.', 'encoder_layer3to2.': 'mix.1.'}
    ours = lambda k: next((b + k.removeprefix(a) for a, b in heads.items() if k.startswith(a)), k)
    net.load_state_dict({ours(k): v for k, v in state.items()}, strict=True)
    levels = []
    for level in (4, 3, 2):
        c = hypercorrelation(f32(f'feats_q_level{level}_i8'), f32(f'feats_s_level{level}_i8'))
        close(c[tuple(torch.from_numpy(a[f'corr_level{level}_index']).long().T)], a[f'corr_level{level}_value'], tol, f'correlation, level {level}')
        close(c.sum((-2, -1)), a[f'corr_level{level}_sum_support'], tol*c.shape[-1]**2/10, f'sums of correlation, level {level}')
        levels.append((f32(f'feats_q_level{level}_i8'), f32(f'feats_s_level{level}_i8')))
    kept = {}
    names = {'squeeze.0': 'encoder_layer4', 'squeeze.1': 'encoder_layer3', 'squeeze.2': 'encoder_layer2', 'mix.0': 'encoder_layer4to3', 'mix.1': 'encoder_layer3to2', 'decoder1': 'decoder1'}
    for mine, theirs in names.items(): net.get_submodule(mine).register_forward_hook(lambda m, i, o, n=theirs: kept.update({n: o.detach()}))
    out = net(levels)
    for n, got in kept.items(): close(got if n == 'encoder_layer4' else got[:, ::8], a[f'stage_{n}'], tol, n)
    close(out.detach(), a['logits'], tol, 'scores')
    with torch.no_grad(): close(net(levels), a['logits'], tol, 'scores in blocks')
    loss = F.cross_entropy(out, torch.from_numpy(a['gt']).long())
    close(loss.detach()[None], a['loss'], tol, 'loss')
    loss.backward()
    grads = {n: p.grad for n, p in net.named_parameters()}
    for n in (n.removeprefix('grad.') for n in a if n.startswith('grad.')): close(grads[ours(n)], a[f'grad.{n}'], tol, f'gradient of {n}')

@torch.no_grad()
def test_transformation(cases):
    folder = cases('patnet_patm')
    a, entry = load(folder, 'patnet_patm')
    tol, state, mask = entry['recommended_atol'], official_state(folder, 'patnet_patm'), torch.from_numpy(a['support_mask']).float()
    for i in range(13):
        q, s = (torch.from_numpy(a[f'{side}{i}_i8']).float()[:, None]/16 for side in 'qs')
        m = resize_mask(mask, s.shape[-2:])
        fg, bg, step = pooled(s, m), pooled(s, 1 - m), {512: 4, 1024: 8, 2048: 16}[s.shape[2]]
        if f'proto_f{i}' in a:
            close(fg[:, 0, ::step], a[f'proto_f{i}'], tol, f'foreground prototype {i}')
            close(bg[:, 0, ::step], a[f'proto_b{i}'], tol, f'background prototype {i}')
            close((s*m[:, None, None])[:, 0, ::step], a[f'masked_s{i}'], tol, f'masked support {i}')
        anchors = rows(state[f'reference_layer{1 + (i > 3) + (i > 9)}.weight'])
        moved = lambda f: torch.einsum('dc,nldhw->nlchw', anchors, project(f, dual(torch.stack([bg, fg], 2))))[:, 0, ::2*step]
        close(moved(q), a[f'tq{i}'], tol, f'mapped query {i}')
        close(moved(s*m[:, None, None]), a[f'ts{i}'], tol, f'mapped support {i}')

def test_published_tuning_loss(cases):
    folder = cases('patnet_full_small')
    a, entry = load(folder, 'patnet_full_small')
    seg, tol = from_official('patnet', official_state(folder, 'patnet_full_small')), entry['recommended_atol']
    seg.backbone.requires_grad_(True)
    e = episode(a, slice(0, 5), 2)
    stages = [n for n in seg.reads if seg.pairs[n] == 0]
    with torch.no_grad(): predicted = seg(episode(a, slice(0, 1), 2)).mask.float()
    match = seg.match(e)
    def loss(mask, shots):
        pool = lambda f, m: pooled(f[:, None], resize_mask(m, f.shape[-2:]))
        return sum(divergence(pool(match.support[n][:, i], match.fg[:, i]), pool(match.query[n], mask)).sum() for n in stages for i in range(shots))/shots
    true = e.query_mask.float()
    terms = [loss(true, 1), loss(predicted, 1), loss(true, 5), loss(predicted, 5)]
    close(torch.stack(terms).detach(), a['kl'], tol, 'divergence')
    for i, term in enumerate(terms[:2]):
        seg.zero_grad()
        term.backward(retain_graph=True)
        norm = lambda m: torch.stack([p.grad.norm() for p in m.parameters() if p.grad is not None] or [torch.zeros(())]).norm()
        got = torch.stack([norm(seg.backbone.stages['stem'].conv1), *(norm(seg.backbone.stages[f'stage{k}']) for k in (1, 2, 3)), norm(seg.anchors)])
        want = torch.from_numpy(a['kl_grad_norms'][i])
        assert torch.allclose(got, want, rtol=1e-3, atol=tol), (got, want)
