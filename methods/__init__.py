"""Methods fit artifacts from data and compile them into edits. One file per method, named after its paper."""
