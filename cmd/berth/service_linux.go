package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/berth-net/berth/internal/control"
	"github.com/berth-net/berth/internal/keeper"
	"github.com/berth-net/berth/internal/supervisor"
)

func serviceCommands() []*cobra.Command {
	return []*cobra.Command{newRunCommand(), newRestartCommand(), newStatusCommand(), newStopCommand(), newDemoCommand()}
}

// child is what this executable does when the keeper starts it as one of its own.
func child() bool { return keeper.Child(supervise) }

func supervise(sock *os.File) int {
	keeper.SurvivePipe()
	s, err := supervisor.New(sock)
	if err != nil {
		fmt.Fprintln(os.Stderr, "berth: error: supervisor:", err)
		return exitFailed
	}
	shutdown := control.Serve(s)
	if err := s.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "berth: error:", err)
		var hint interface{ Hint() string }
		if errors.As(err, &hint) && hint.Hint() != "" {
			fmt.Fprintln(os.Stderr, "berth: hint:", hint.Hint())
		}
		return exitFailed
	}
	if s.Failed() {
		fmt.Fprintln(os.Stderr, "berth: hint: what the program printed is above; --ready and --ready-timeout say when a start is ready")
	}
	shutdown()
	if err := s.Finish(); err != nil {
		return exitFailed
	}
	return exitDone
}

// target is the service that a command speaks to: by name, by control socket, or the only one there is.
type target struct{ control string }

func (t *target) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&t.control, "control", "", "control socket of the service, `PATH`")
	cmd.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return control.Names(), cobra.ShellCompDirectiveNoFileComp
	}
}

func (t *target) dial(args []string) (*control.Client, error) {
	path := t.control
	if path != "" && len(args) > 0 {
		return nil, usage("", "both a name (%s) and --control (%s) are given", args[0], path)
	}
	if len(args) > 0 {
		if err := checkName(args[0]); err != nil {
			return nil, err
		}
		path = control.Socket(args[0])
	}
	if path == "" {
		switch names := control.Names(); len(names) {
		case 0:
			return nil, failed(errors.New("no berth of this user runs"), "start one with `berth run -- COMMAND`; one with its own control socket needs --control PATH")
		case 1:
			path = control.Socket(names[0])
		default:
			return nil, usage("name one of them", "several services run: %s", strings.Join(names, ", "))
		}
	}
	client, err := control.Dial(path)
	if errors.Is(err, os.ErrNotExist) {
		hint := "no berth of this user runs"
		if names := control.Names(); len(names) > 0 {
			hint = "these run: " + strings.Join(names, ", ")
		}
		return nil, failed(fmt.Errorf("no service has the control socket %s", path), hint)
	}
	if err != nil {
		return nil, failed(err, "")
	}
	return client, nil
}

func checkName(name string) error {
	if name == "" || len(name) > 64 || name[0] == '.' || name[0] == '-' || strings.ContainsFunc(name, func(r rune) bool {
		return !strings.ContainsRune("-_.@+", r) && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) {
		return usage("letters, digits and -_.@+, 64 at most", "%q can't be a service's name", name)
	}
	return nil
}
