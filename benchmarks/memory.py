"""Memory of one training step of SCCAN, HDMNet and PAHNet at full size (ResNet-50, 473 px, 4 episodes), with fused and with plain attention side by side.

On a GPU: the step is taken, and its peak is `torch.cuda.max_memory_allocated`. Without one nothing is computed (fake tensors): counted are weights, gradients, the state of
AdamW, the inputs, and every tensor that is kept for the backward pass; what a single operation needs for a moment is not, so that the true peak lies somewhat higher.

    python benchmarks/memory.py
    python benchmarks/memory.py --backbone resnet101 --size 633 --batch 4 --recipes hdmnet,pahnet
"""
import argparse, contextlib
from unittest import mock
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from cdfss.episode import Episode
from cdfss.methods.seams import build
from cdfss.models.backbones import BackboneOptions, create_backbone

GIB = 2**30

def plain(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    "What `scaled_dot_product_attention` computes, with every step kept."
    logits = query @ key.mT * (query.shape[-1]**-.5 if scale is None else scale)
    if attn_mask is not None: logits = logits.masked_fill(~attn_mask, float('-inf')) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1) @ value

def attention(fused:bool): return contextlib.nullcontext() if fused else mock.patch('torch.nn.functional.scaled_dot_product_attention', plain)

def prepared(recipe:str, backbone:str, size:int, batch:int, device:str='cpu'):
    "A segmenter in training mode, its trained parameters, and a batch of one-shot episodes."
    net = create_backbone(BackboneOptions(backbone=backbone, weights='none', last_stage='last', output_stride=8, freeze='all', last_relu=True))
    seg, m = build(recipe, net).train(), torch.zeros(batch, size, size, dtype=torch.bool, device=device)
    if device != 'cpu': seg = seg.to(device)                                  # fake tensors refuse to be moved
    m[:, :size//2] = True
    image = torch.zeros(batch, 3, size, size, device=device)
    return seg, [p for p in seg.parameters() if p.requires_grad], Episode(query=image, support=image[:, None].clone(), support_masks=m[:, None], query_mask=m)

def peak(recipe:str, size:int, batch:int, backbone:str='resnet50', fused:bool=True) -> float:
    "GiB of a training step without computing anything; see above."
    held, seen = [], set()
    def keep(t):
        storage = t.untyped_storage()
        if id(storage) not in seen: seen.add(id(storage)); held.append(storage)
        return t
    with FakeTensorMode(allow_non_fake_inputs=True), attention(fused):
        seg, trained, episode = prepared(recipe, backbone, size, batch)
        for t in (*seg.parameters(), *seg.buffers(), episode.query, episode.support): keep(t)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): sum(seg.loss(episode).values())
        return (sum(s.nbytes() for s in held) + 3*4*sum(p.numel() for p in trained))/GIB

def measured(recipe:str, size:int, batch:int, backbone:str, fused:bool) -> float:
    "GiB at the peak of the second of two real steps on the GPU."
    seg, trained, episode = prepared(recipe, backbone, size, batch, 'cuda')
    optimizer = torch.optim.AdamW(trained, fused=True)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with attention(fused): loss = sum(seg.loss(episode).values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return torch.cuda.max_memory_allocated()/GIB

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--backbone', default='resnet50'); p.add_argument('--size', type=int, default=473); p.add_argument('--batch', type=int, default=4)
    p.add_argument('--recipes', default='sccan,hdmnet,sccan+pfe+asc,pahnet')
    o = p.parse_args()
    gpu = torch.cuda.is_available()
    print(f"{o.backbone}, {o.size} px, {o.batch} episodes: GiB {'at the peak of a real step on ' + torch.cuda.get_device_name() if gpu else 'kept in a step, nothing computed'}")
    print(f"{'recipe':16}{'fused':>8}{'plain':>8}  fused within 24 GB")
    for recipe in o.recipes.split(','):
        of = {fused: measured(recipe, o.size, o.batch, o.backbone, fused) if gpu else peak(recipe, o.size, o.batch, o.backbone, fused) for fused in (True, False)}
        print(f"{recipe:16}{of[True]:8.1f}{of[False]:8.1f}  {'yes' if of[True]*GIB < 24e9 else 'no'}", flush=True)
