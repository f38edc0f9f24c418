"""The counts of SDXL and its students, and what `koala inspect` shows of them."""

import json
from functools import cache

import pytest
import yaml

from koala.errors import KoalaError
from koala.inspect import inspect
from koala.unet.blocks import keep
from koala.unet.cost import student_cost, unet_cost
from koala.unet.reference import SDXL
from koala.unet.student import empty_unet, student_config

PARAMETERS = {
    "sdxl": 2_567_463_684,
    "koala-1b": 1_161_184_324,
    "koala-700m": 782_822_724,
    "bk-base": 1_717_277_764,
    "ssd-1b": 1_331_334_404,
    "vega": 745_225_604,
}
MILLIONS = {  # DW1, DW2, DW3, Mid, UP1, UP2, UP3, other
    "sdxl": (5.4, 60.1, 757.4, 413.1, 1206.6, 106.3, 11.2, 7.3),
    "koala-1b": (3.2, 31.1, 236.4, 274.1, 528.5, 72.8, 7.8, 7.3),
    "koala-700m": (3.2, 31.1, 201.6, 459.0, 72.8, 7.8, 7.3),
    "bk-base": (3.2, 31.1, 375.4, 413.1, 806.6, 72.8, 7.8, 7.3),
    "ssd-1b": (5.4, 60.1, 340.3, 31.1, 789.5, 86.3, 11.2, 7.3),
    "vega": (5.4, 40.1, 201.3, 31.1, 372.4, 76.3, 11.2, 7.3),
}
TFLOP = {  # at 512 and at 1024 px
    "sdxl": (1.589, 6.761),
    "koala-1b": (0.802, 3.432),
    "koala-700m": (0.623, 2.702),
}
SELF_ATTENTIONS = {"sdxl": 70, "koala-1b": 30, "koala-700m": 21}

pytestmark = pytest.mark.usefixtures("counted_once")


@pytest.fixture(scope="module")
def cost_of(rules):
    """(student, image size in pixels) -> its cost, counted once."""
    return cache(lambda name, size: student_cost(SDXL, rules[name], latent_size=size // 8))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_by_stage(cost_of, name):
    cost = cost_of(name, 1024)
    assert cost.parameters == PARAMETERS[name]
    assert tuple(round(stage.parameters / 1e6, 1) for stage in cost.stages.values()) == MILLIONS[name]
    names = ["DW1", "DW2", "DW3", *(["Mid"] if name != "koala-700m" else []), "UP1", "UP2", "UP3", "other"]
    assert list(cost.stages) == names


@pytest.mark.parametrize("name", TFLOP)
@pytest.mark.parametrize("size", [512, 1024])
def test_flops_within_a_thousandth(cost_of, name, size):
    cost = cost_of(name, size)
    assert cost.flops / 1e12 == pytest.approx(TFLOP[name][size == 1024], rel=1e-3)
    assert all(stage.flops > 0 for stage in cost.stages.values())


@pytest.mark.parametrize("name", SELF_ATTENTIONS)
def test_self_attention_layers_are_those_of_the_model(cost_of, rules, name):
    unet = empty_unet(student_config(SDXL, keep(SDXL, rules[name])))
    modules = [path for path, _ in unet.named_modules() if path.endswith(".attn1")]
    assert cost_of(name, 1024).self_attentions == len(modules) == SELF_ATTENTIONS[name]


def test_json_is_all_that_stdout_holds(capsys):
    inspect("bk-base", size=512, as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert (data["target"], data["size"], data["parameters"]) == ("bk-base", 512, PARAMETERS["bk-base"])
    assert data["stages"]["UP1"]["self_attentions"] == 20
    assert sum(stage["parameters"] for stage in data["stages"].values()) == data["parameters"]
    assert sum(stage["flops"] for stage in data["stages"].values()) == data["flops"]
    assert data["sdxl"]["parameters"] == PARAMETERS["sdxl"]
    assert data["sdxl"]["flops"] / 1e12 == pytest.approx(1.589, rel=1e-3)


def test_a_student_of_params_yaml_beside_sdxl(capsys, monkeypatch, request, tmp_path):
    monkeypatch.chdir(request.config.rootpath)
    plot = tmp_path / "new" / "cost.png"
    inspect("koala-700m", plot=plot)
    printed = capsys.readouterr().out
    assert "koala-700m: 782,822,724 parameters (30.5% of SDXL)" in printed
    assert "SDXL: 2,567,463,684 parameters" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()}
    assert rows["Mid"][:5] == ["-", "-", "-", "-", "413.1"]
    assert rows["total"] == ["782.8", "100.0%", "2.702", "21", "2567.5", "100.0%", "6.761", "70"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def write_folder(folder, unet, vae=None):
    for name, config in (("unet", unet), ("vae", vae)):
        if config is not None:
            (folder / name).mkdir(parents=True)
            (folder / name / "config.json").write_text(json.dumps(config))


def test_a_model_folder_is_counted_from_its_configurations(tmp_path, tiny_config, capsys):
    """32 px and a VAE that divides by 4 give latents of 8 x 8."""
    write_folder(tmp_path, {"_class_name": "UNet2DConditionModel"} | tiny_config, {"block_out_channels": [8, 8, 8]})
    inspect(str(tmp_path), size=32, as_json=True)
    data = json.loads(capsys.readouterr().out)
    cost = unet_cost(tiny_config, latent_size=8)
    assert (data["parameters"], data["flops"]) == (cost.parameters, cost.flops)
    assert cost.parameters == empty_unet(tiny_config).num_parameters()
    inspect(str(tmp_path / "unet"), size=64, as_json=True)
    assert json.loads(capsys.readouterr().out)["flops"] == cost.flops


def test_a_folder_of_another_depth_than_sdxl_has_rows_of_its_own(tmp_path, tiny_config, capsys):
    four = tiny_config | {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [32, 32, 32, 64],
        "transformer_layers_per_block": 1,
        "attention_head_dim": 2,
    }
    write_folder(tmp_path, four)
    inspect(str(tmp_path), size=128)
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()]
    order = ["DW1", "DW2", "DW3", "DW4", "Mid", "UP1", "UP2", "UP3", "UP4", "other", "total"]
    assert [row for row in rows if row in order] == order


@pytest.mark.parametrize(
    ("unet", "complaint"),
    [
        (None, "config.json is missing"),
        ([], "is not the configuration"),
        ({"block_out_channels": [32]}, "describes no U-Net"),
        ({"block_out_channels": "x"}, "describes no U-Net"),
    ],
)
def test_folders_without_such_a_unet_are_refused(tmp_path, unet, complaint):
    write_folder(tmp_path, unet)
    with pytest.raises(KoalaError, match=complaint):
        inspect(str(tmp_path))


def test_a_file_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(KoalaError, match="cannot be read as JSON"):
        inspect(str(tmp_path))


def test_an_unknown_target_is_told_what_there_is(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(KoalaError, match=r"'koala-9b' is neither .* koala-700m, koala-1b, sdxl, bk-base") as refusal:
        inspect("koala-9b")
    assert "\n" not in str(refusal.value)


def test_a_student_that_cannot_be_built_is_not_counted(monkeypatch, request, tmp_path):
    params = yaml.safe_load((request.config.rootpath / "params.yaml").read_text())
    params["students"] = {"misfit": {"unet": {"down_pairs": [0], "up_pairs": [0, 1], "mid": "keep"}}}
    (tmp_path / "infra").symlink_to(request.config.rootpath / "infra")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KoalaError, match="the stage's pair 2 fits"):
        inspect("misfit")


@pytest.mark.parametrize("size", [0, -8, 1020])
def test_a_size_that_the_vae_cannot_divide_is_refused(size):
    with pytest.raises(KoalaError, match="must be a multiple of 8 pixels"):
        inspect("sdxl", size=size)


def test_a_plot_of_no_known_kind_is_refused(tmp_path):
    with pytest.raises(KoalaError, match=r"name a \.png"):
        inspect("vega", size=512, as_json=True, plot=tmp_path / "plot.xyz")
