// Command berth keeps a server's port open while everything behind it changes.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

// Exit statuses of all commands.
const (
	exitDone    = 0
	exitFailed  = 1
	exitUsage   = 2
	exitUnknown = 3
)

func main() {
	if child() {
		return
	}
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	root := newRoot()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(context.Background())
	if err == nil {
		return exitDone
	}
	status := exitUsage
	var code interface{ ExitCode() int }
	if errors.As(err, &code) {
		status = code.ExitCode()
	}
	if text := err.Error(); text != "" {
		fmt.Fprintln(os.Stderr, "berth: error:", text)
	}
	var hint interface{ Hint() string }
	if errors.As(err, &hint) && hint.Hint() != "" {
		fmt.Fprintln(os.Stderr, "berth: hint:", hint.Hint())
	} else if status == exitUsage {
		fmt.Fprintf(os.Stderr, "berth: hint: see `%s --help`\n", strings.TrimSuffix(cmd.CommandPath(), " "))
	}
	return status
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "berth",
		Short: "The port stays open while everything behind it changes",
		Long: `berth keeps a server's port open while the program behind it restarts, crashes and changes.
It works for any program, unmodified.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 can't tell.`,
		Example: `  berth run --listen :8080 -- java -jar app.jar
  berth restart
  berth status`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       version(),
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return err })
	root.AddCommand(serviceCommands()...)
	root.AddCommand(newLoadCommand(), newManCommand(root))
	return root
}

// failure is an error with its exit status and, if there is one, what to do about it.
type failure struct {
	err    error
	hint   string
	status int
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }
func (f *failure) Hint() string {
	if f.hint != "" {
		return f.hint
	}
	var hint interface{ Hint() string }
	if errors.As(f.err, &hint) {
		return hint.Hint()
	}
	return ""
}
func (f *failure) ExitCode() int { return f.status }

func failed(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &failure{err, hint, exitFailed}
}

func usage(hint, format string, args ...any) error {
	return &failure{fmt.Errorf(format, args...), hint, exitUsage}
}
