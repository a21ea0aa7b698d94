"""Settings of runs that an earlier version made, with what was not yet a key when they began, as it then was."""

from rpo import config


def completed_loss(loss: dict) -> dict:
    """A run's loss with what was not yet a key when it began: only ipo read `normalize` then."""
    if "lam" in loss:
        return loss
    was = loss.get("normalize", True) and loss.get("preference") == "ipo"
    return loss | {"normalize": was, "lam": None, "clip": None, "gamma": None}


def completed(settings: dict) -> dict:
    """A run's settings, or what there is of them."""
    model = {"lora": config.to_dict(config.NO_ADAPTER), "load_in_4bit": False}
    model |= {"save_dtype": "auto", "save_merged": False, "save": "last"}
    defaults = {
        "model": model,
        "reference": {"alpha": None, "every": None},
        "stop": {"metric": None, "patience": 3, "min_delta": 0.0},
    }
    own = {name: values | settings[name] for name, values in defaults.items() if isinstance(settings.get(name), dict)}
    if isinstance(settings.get("loss"), dict):
        own["loss"] = completed_loss(settings["loss"])
    return {"stop": defaults["stop"]} | settings | own
