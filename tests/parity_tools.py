"What every parity test needs: the weight rule, the image rule and the tolerance of a case (tests/data/parity/manifest.json says what they are)."
import json, re, zlib
from pathlib import Path
import numpy as np
import torch

def load(folder:Path, case:str) -> tuple[dict, dict]:
    "The arrays of a case and its manifest entry."
    with np.load(folder/f'{case}.npz') as z: arrays = {k: z[k] for k in z.files}
    return arrays, json.loads((folder/'manifest.json').read_text())['cases'][case]

def fill(key:str, shape, gains=()) -> torch.Tensor:
    "One tensor by the weight rule."
    n = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    last = re.split('[.:]', key)[-1]
    if last == 'num_batches_tracked': return torch.tensor(0)
    if last == 'running_var': v = .5 + .5 * np.abs(n)
    elif last == 'running_mean': v = .1 * n
    elif last in ('relative_position_bias_table', 'pos_embed', 'cls_token', 'prompt_tokens', 'mask_amplitude', 'mask_phase'): v = .5 * n
    elif len(shape) > 1: v = n * np.sqrt(2 / np.prod(shape[1:]))
    elif last == 'weight': v = 1 + .1 * n
    elif last.endswith('bias'): v = .1 * n
    else: v = .5 * n
    for pattern, factor in gains:
        if re.search(pattern, key): v = v * factor
    return torch.from_numpy(np.asarray(v, np.float32))

def official_state(folder:Path, case:str) -> dict[str, torch.Tensor]:
    "The state dict of a case under the authors' own names."
    arrays, entry = load(folder, case)
    keys = json.loads((folder/f'{case}.keys.json').read_text())
    state = {k: fill(k, shape, entry['weight_rule'].get('gains', ())) for k, (shape, _) in keys.items()}
    for name, value in arrays.items():
        if name.startswith('override.'): state[name.removeprefix('override.')] = torch.from_numpy(value)
    return state

def images(u8:np.ndarray) -> torch.Tensor:
    "uint8 images, channels third from last, normalised."
    mean, std = torch.tensor([.485, .456, .406]).view(3, 1, 1), torch.tensor([.229, .224, .225]).view(3, 1, 1)
    return (torch.from_numpy(u8).float() / 255 - mean) / std

def close(got, want, atol, what):
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    assert got.shape == want.shape, f'{what}: shape {tuple(got.shape)}, reference {tuple(want.shape)}'
    worst = (got - want).abs().max().item()
    assert worst <= atol, f'{what}: differs by {worst:.2e} from the reference, allowed {atol:.0e}'
