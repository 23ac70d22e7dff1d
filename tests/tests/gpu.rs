//! Every kernel on a GPU. Built with `--features gpu`; carries its cases, so that the binary alone can be taken to a GPU
//! machine. `--list` names the tests, any argument filters them.

fn main() -> std::process::ExitCode {
    dsv_tests::gpu::main()
}
