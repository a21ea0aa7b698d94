"""Settings of runs that an earlier version made, with what was not yet a key when they began, as it then was."""

from rpo import config


def completed_loss(loss: dict) -> dict:
    """A run's loss with what was not yet a key when it began: only ipo read `normalize` then."""
    if "lam" in loss or "normalize" not in loss:
        return loss
    was = loss["normalize"] and loss.get("preference") == "ipo"
    return loss | {"normalize": was, "lam": None, "clip": None, "gamma": None}


def completed(settings: dict) -> dict:
    """A run's settings with what was not yet a key when it began, as it then was."""
    model = {
        "lora": config.to_dict(config.NO_ADAPTER),
        "load_in_4bit": False,
        "save_dtype": "auto",
        "save_merged": False,
        "save": "last",
    }
    stop = {"metric": None, "patience": 3, "min_delta": 0.0}
    own = {"model": model | settings["model"], "loss": completed_loss(settings["loss"])}
    own["reference"] = {"alpha": None, "every": None} | settings["reference"]
    return {"stop": stop} | settings | own
