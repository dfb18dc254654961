import os
import subprocess
import sys

from fuchsia_pl.engines.output import output_to, tail


def test_output_of_this_process_and_its_children_goes_to_the_file_and_back(tmp_path, capfd):
    file = tmp_path / "engine.log"
    with output_to(file):
        os.write(1, b"from a descriptor\n")
        subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write('from a child\\n')"], check=True)
    os.write(1, b"afterwards\n")
    assert set(file.read_text().splitlines()) == {"from a descriptor", "from a child"}
    assert capfd.readouterr().out == "afterwards\n"


def test_the_tail_is_the_end(tmp_path):
    file = tmp_path / "engine.log"
    assert tail(file) == "(no output)"
    file.write_text("\n".join(map(str, range(100))))
    assert tail(file, num_lines=2) == "98\n99"
