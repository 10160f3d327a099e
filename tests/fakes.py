"Made-up file trees: empty files where only names matter, tiny pictures where content does."
from pathlib import Path
import numpy as np
from PIL import Image

def touch(root:Path, *names:str, text:str=''):
    for n in names:
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        (root/n).write_text(text)

def picture(path:Path, seed:int=0, size=(40, 30)):
    "A random photograph, width x height."
    path.parent.mkdir(parents=True, exist_ok=True)
    w, h = size
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path)

def blob(path:Path, seed:int=0, size=(40, 30), on:int=255):
    "A rectangle as binary mask."
    path.parent.mkdir(parents=True, exist_ok=True)
    w, h = size
    m = np.zeros((h, w), np.uint8)
    m[h//4:h//4 + h//2, seed % (w//2):seed % (w//2) + w//3] = on
    Image.fromarray(m).save(path)

def polyps(root:Path, n:int=6, size=(40, 30)) -> Path:
    for i in range(n):
        picture(root/f'Kvasir-SEG/images/{i}.jpg', i, size)
        blob(root/f'Kvasir-SEG/masks/{i}.png', i, size)
    return root

def label(path:Path, values:list[int], size=(40, 30), void:int=1):
    "An index map: a vertical stripe per value, `void` rows of 255 on top, background at the bottom."
    path.parent.mkdir(parents=True, exist_ok=True)
    w, h = size
    m = np.zeros((h, w), np.uint8)
    for k, v in enumerate(values): m[:h//2, k*w//len(values):(k + 1)*w//len(values)] = v
    m[:void] = 255
    im = Image.fromarray(m, 'P')
    im.putpalette([v for i in range(256) for v in (i, 255 - i, 7*i % 256)])
    im.save(path)

def voc(root:Path, images:dict[str, list[int]], train:list[str]|None=None, val:list[str]|None=None) -> Path:
    "VOC2012 with an index map per id holding the given values."
    for k, (i, values) in enumerate(images.items()):
        picture(root/f'VOC2012/JPEGImages/{i}.jpg', k)
        label(root/f'VOC2012/SegmentationClassAug/{i}.png', values)
    touch(root, 'VOC2012/ImageSets/Segmentation/trainaug.txt', text='\n'.join(images if train is None else train) + '\n')
    if val is not None: touch(root, 'VOC2012/ImageSets/Segmentation/val.txt', text='\n'.join(val) + '\n')
    return root
