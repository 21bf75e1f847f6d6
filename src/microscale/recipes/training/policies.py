"""How the policy of a training run is written down."""

from dataclasses import replace

from microscale.operands import WIDE
from microscale.policy import POLICY_FILES, Policy
from microscale.profiles import policy_files


def training_policy(spelling: str, ignore: tuple[str, ...] = ()) -> Policy:
    """Read the name of a training policy, a policy file, or formats.

    Formats are `all`, `weight/activation` or `weight/activation/gradient`, with a profile before
    them if wanted; gradients have the activations' format unless they are given ("fp32" leaves the
    backward pass alone). "mxfp8", "nvfp4" and "mxfp4" alone are the policies of these names. The
    modules that match `ignore` are left alone. Raises MicroscaleError.
    """
    text = spelling.strip()
    if text.endswith(POLICY_FILES):
        policy = Policy.read(text)
    elif text in policy_files():
        policy = Policy.named(text)
    else:
        policy = Policy.parse(_with_gradients(text))
    return replace(policy, ignore=(*policy.ignore, *ignore))


def _with_gradients(spelling: str) -> str:
    profile, colon, formats = spelling.rpartition(":")
    parts = formats.split("/")
    if len(parts) > 2 or formats.strip().lower() == WIDE:
        return spelling
    return f"{profile}{colon}{parts[0]}/{parts[-1]}/{parts[-1]}"
