__version__ = "0.1.0"

def __getattr__(name):
    "`cdfss.load` and what goes with it (`cdfss/use`), imported when first asked for, so that `import cdfss` stays quick."
    if name not in ('load', 'FewShot', 'save_coco'): raise AttributeError(f"module 'cdfss' has no attribute '{name}'")
    from .use import results, segment
    return results.save_coco if name == 'save_coco' else getattr(segment, name)
