__version__ = "0.1.0"

def __getattr__(name):
    "`cdfss.load` and what goes with it (`cdfss/use`), imported when first asked for: `import cdfss` stays quick, and the floors know of no import from here."
    import importlib
    room = dict(load='segment', FewShot='segment', save_coco='results').get(name)
    if room is None: raise AttributeError(f"module 'cdfss' has no attribute '{name}'")
    return getattr(importlib.import_module(f'cdfss.use.{room}'), name)
