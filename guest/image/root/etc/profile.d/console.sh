# TERM=dumb on the kernel's command line: a console that programs can read. No echo, no line editing, a fixed prompt.
if [ "$TERM" = dumb ] && [ -n "$BASH_VERSION" ]; then
    set +o emacs
    stty -echo
    PS1='posada# '
fi
