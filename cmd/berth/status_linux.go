package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/berth-net/berth/internal/control"
	"github.com/berth-net/berth/internal/supervisor"
	"github.com/berth-net/berth/internal/sys"
)

func newStatusCommand() *cobra.Command {
	var to target
	var asJSON bool
	var watch time.Duration
	cmd := &cobra.Command{
		Use:   "status [NAME]",
		Short: "Show generations, queues and what each restart cost",
		Example: `  berth status
  berth status web --json
  berth status --watch`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("watch") && watch < 50*time.Millisecond {
				return usage("", "--watch %s is shorter than 50ms", watch)
			}
			clients, err := to.dialAll(args)
			if err != nil {
				return err
			}
			for {
				var b strings.Builder
				for i, client := range clients {
					if i > 0 && !asJSON {
						b.WriteByte('\n')
					}
					ctx, cancel := context.WithTimeout(cmd.Context(), 10*time.Second)
					st, err := client.Status(ctx)
					cancel()
					if err != nil {
						return failed(err, "")
					}
					if asJSON {
						enc := json.NewEncoder(&b)
						enc.SetIndent("", "  ")
						_ = enc.Encode(st)
					} else {
						writeStatus(&b, st)
					}
				}
				if watch > 0 && !asJSON && sys.IsTerminal(os.Stdout) {
					fmt.Print("\x1b[H\x1b[2J")
				}
				fmt.Print(b.String())
				if watch == 0 {
					return nil
				}
				if err := pause(cmd.Context(), watch); err != nil {
					return nil
				}
			}
		},
	}
	to.flags(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, one object a service")
	cmd.Flags().DurationVar(&watch, "watch", 0, "print again every `TIME`")
	cmd.Flags().Lookup("watch").NoOptDefVal = "1s"
	return cmd
}

// dialAll is one client, or without a name or socket those of all services there are.
func (t *target) dialAll(args []string) ([]*control.Client, error) {
	names := control.Names()
	if t.control != "" || len(args) > 0 || len(names) == 0 {
		c, err := t.dial(args)
		return []*control.Client{c}, err
	}
	var clients []*control.Client
	for _, name := range names {
		c, err := control.Dial(control.Socket(name))
		if err != nil {
			return nil, failed(err, "")
		}
		clients = append(clients, c)
	}
	return clients, nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func writeStatus(out io.Writer, st supervisor.Status) {
	fmt.Fprintf(out, "%s: %s\n", st.Name, strings.Join(st.Command, " "))
	if st.CrashLoop != "" {
		fmt.Fprintf(out, "  %s\n", strings.ToUpper(st.CrashLoop[:1])+st.CrashLoop[1:])
	}
	if st.Stopping {
		fmt.Fprintln(out, "  stopping")
	}
	if st.Queue > 0 {
		fmt.Fprintf(out, "  restarts waiting: %d\n", st.Queue)
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "  GENERATION\tSTATE\tFOR\tPIDS\tCONNECTIONS\tLISTENS ON\tQUEUE")
	for _, g := range st.Serving {
		state := string(g.Phase)
		if g.Dead && g.Phase == supervisor.Serving {
			state = "dead (" + g.Exit + ")"
		}
		fmt.Fprintf(w, "  %d\t%s\t%s\t%s\t%d", g.Number, state, age(g.Age), pids(g.PIDs), g.Connections)
		if len(g.Listeners) == 0 {
			fmt.Fprint(w, "\t-\t-\n")
		}
		for i, l := range g.Listeners {
			if i > 0 {
				fmt.Fprint(w, "  \t\t\t\t")
			}
			fmt.Fprintf(w, "\t%s\t%d of %d\n", l.Address, l.Waiting, l.Limit)
		}
	}
	for _, l := range st.Waiting {
		fmt.Fprintf(w, "  -\twaiting room\t\t\t\t%s\t%d of %d\n", l.Address, l.Waiting, l.Limit)
	}
	w.Flush()
	fmt.Fprintf(out, "  steering: %s\n", because(st.Means.Steering, st.Means.SteeringWhy))
	if st.Means.Adoption == "duplicate" {
		fmt.Fprintln(out, "  adoption: the program's own socket")
	} else {
		fmt.Fprintln(out, "  adoption: "+because("a socket of berth's in the place of the program's; kept-alive connections can't be ended politely", st.Means.AdoptionWhy))
	}
	if !st.Means.Intercept {
		fmt.Fprintln(out, "  interception: "+because("none, only LISTEN_FDS", st.Means.InterceptWhy))
	}
	fmt.Fprintf(out, "  in flight by: %s\n", st.Order)
	fmt.Fprintf(out, "  processes by: %s\n", st.Group)
	for i, e := range st.Ledger {
		if i >= len(st.Ledger)-5 {
			fmt.Fprintf(out, "  %s\n", e)
		}
	}
}

func because(what, why string) string {
	if why == "" {
		return what
	}
	return what + " (" + why + ")"
}

func age(ms float64) string {
	d := time.Duration(ms * float64(time.Millisecond))
	if d < time.Minute {
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

func pids(pids []int) string {
	if len(pids) == 0 {
		return "-"
	}
	var parts []string
	for i, pid := range pids {
		if i == 4 {
			parts = append(parts, fmt.Sprintf("+%d", len(pids)-i))
			break
		}
		parts = append(parts, fmt.Sprint(pid))
	}
	return strings.Join(parts, " ")
}
